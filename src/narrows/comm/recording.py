"""The exchanges of a captured step, kept so that they can be replayed.

Replayed exchanges read and write the memory that they did when they were captured. So the recording reserves those
blocks until it is closed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from time import monotonic
from typing import Protocol

from narrows.comm.fingerprint import Fingerprint
from narrows.comm.segment import Block

__all__ = ["Recording", "Tape"]


class Tape(Protocol):
    """What makes recorded calls again; see :class:`narrows.native.tape.Tape`."""

    @property
    def size(self) -> int: ...

    @property
    def position(self) -> int: ...

    def rewind(self) -> None: ...

    def run(self) -> int: ...


class Member(Protocol):
    """A place in a group, which counts the collectives there."""

    number: int


class Transport(Protocol):
    """A group's exchanges, and how many members it has."""

    number: int
    size: int


class Recording:
    """Exchanges by their place on ``tape``."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.fingerprints: list[tuple[int, Member, tuple[int, ...], Fingerprint]] = []
        """(place, member, ranks, fingerprint) of every collective, with the numbers of the recording."""
        self.exchanges: list[tuple[int, Transport]] = []
        """(place, transport) of every exchange; a collective may make two."""
        self._blocks: tuple[Block, ...] = ()
        self._waiting: tuple[int, float] | None = None

    @property
    def nbytes(self) -> int:
        """Of the blocks that are this recording's alone."""
        return sum(block.size for block in self._blocks)

    def collective(self, member: Member, ranks: tuple[int, ...], fingerprint: Fingerprint) -> None:
        self.fingerprints.append((self.tape.size, member, ranks, fingerprint))

    def exchange(self, transport: Transport) -> None:
        self.exchanges.append((self.tape.size, transport))

    def end(self, count: int, blocks: Sequence[Block]) -> None:
        """Keep what came before call ``count`` of the tape, and these blocks for it alone."""
        self.fingerprints = [entry for entry in self.fingerprints if entry[0] < count]
        self.exchanges = [entry for entry in self.exchanges if entry[0] < count]
        self._blocks = tuple(dict.fromkeys(blocks))
        for block in blocks:
            block.reserved = True

    def close(self) -> None:
        """The blocks are anybody's again once all have read what the last run left there: when the largest group has
        met once more. If there is none that all others are within, they stay as they are."""
        members = {rank for _, _, ranks, _ in self.fingerprints for rank in ranks}
        transport = max(
            (transport for _, transport in self.exchanges), key=lambda transport: transport.size, default=None
        )
        if transport is not None and transport.size < len(members):
            return
        for block in self._blocks:
            block.after = None if transport is None else (transport, transport.number)
            block.reserved = False
        self._blocks = ()

    def waits(self) -> None:
        """The call at the tape's position has waited in vain for some time."""
        position = self.tape.position
        if self._waiting is None or self._waiting[0] != position:
            self._waiting = position, monotonic()

    def at(self) -> tuple[Fingerprint, tuple[int, ...], float | None] | None:
        """The collective that the run has come to last, its group, and since when it waits there in vain, if so."""
        position = self.tape.position
        i = bisect_right(self.fingerprints, position, key=lambda entry: entry[0]) - 1
        if i < 0:
            return None
        _, member, ranks, fingerprint = self.fingerprints[i]
        before = sum(entry[1] is member for entry in self.fingerprints[:i])
        waiting = self._waiting
        since = waiting[1] if waiting is not None and waiting[0] == position else None
        return fingerprint._replace(number=member.number + before), ranks, since

    def came(self, member: Member) -> int:
        """How many collectives of a member the run has come to."""
        position = self.tape.position
        return sum(entry[1] is member and entry[0] <= position for entry in self.fingerprints)

    def done(self) -> None:
        """The run has ended well: what was counted in the recording counts again."""
        for _, member, _, _ in self.fingerprints:
            member.number += 1
        for _, transport in self.exchanges:
            transport.number += 1
        self._waiting = None
