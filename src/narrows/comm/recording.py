"""What a world keeps of the exchanges that are made while a walk is recorded, so that they can be made again.

Knows positions on a tape, stamps, wires and blocks; not what the tape is, nor what is between the exchanges. Repeated
exchanges read and write the memory they did, so its blocks are nobody else's until the recording is closed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from time import monotonic
from typing import Protocol

from narrows.comm.segment import Block
from narrows.comm.stamps import Stamp

__all__ = ["Recording", "Tape"]


class Tape(Protocol):
    """What makes recorded calls again; see :class:`narrows.native.tape.Tape`."""

    @property
    def size(self) -> int: ...

    @property
    def position(self) -> int: ...

    def rewind(self) -> None: ...

    def run(self) -> int: ...


class Seat(Protocol):
    """A place in a group, which counts the collectives there."""

    number: int


class Wire(Protocol):
    """A group's exchanges, and how many members it has."""

    number: int
    size: int


class Recording:
    """Exchanges by their place on ``tape``."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.stamps: list[tuple[int, Seat, tuple[int, ...], Stamp]] = []
        """(place, seat, ranks, stamp) of every collective; the stamps' numbers are those of the recording."""
        self.exchanges: list[tuple[int, Wire]] = []
        """(place, wire) of every exchange; a collective may make two."""
        self._blocks: tuple[Block, ...] = ()
        self._waiting: tuple[int, float] | None = None

    @property
    def nbytes(self) -> int:
        """Of the blocks that are this recording's alone."""
        return sum(block.size for block in self._blocks)

    def collective(self, seat: Seat, ranks: tuple[int, ...], stamp: Stamp) -> None:
        self.stamps.append((self.tape.size, seat, ranks, stamp))

    def exchange(self, wire: Wire) -> None:
        self.exchanges.append((self.tape.size, wire))

    def end(self, count: int, blocks: Sequence[Block]) -> None:
        """Keep what came before call ``count`` of the tape, and these blocks for it alone."""
        self.stamps = [entry for entry in self.stamps if entry[0] < count]
        self.exchanges = [entry for entry in self.exchanges if entry[0] < count]
        self._blocks = tuple(dict.fromkeys(blocks))
        for block in blocks:
            block.reserved = True

    def close(self) -> None:
        """The blocks are anybody's again once all have read what the last run left there: when the largest group has
        met once more. If there is none that all others are within, they stay as they are."""
        members = {rank for _, _, ranks, _ in self.stamps for rank in ranks}
        wire = max((wire for _, wire in self.exchanges), key=lambda wire: wire.size, default=None)
        if wire is not None and wire.size < len(members):
            return
        for block in self._blocks:
            block.after = None if wire is None else (wire, wire.number)
            block.reserved = False
        self._blocks = ()

    def waits(self) -> None:
        """The call at the tape's position has waited in vain for some time."""
        position = self.tape.position
        if self._waiting is None or self._waiting[0] != position:
            self._waiting = position, monotonic()

    def at(self) -> tuple[Stamp, tuple[int, ...], float | None] | None:
        """The collective that the run has come to last, its group, and since when it waits there in vain, if so."""
        position = self.tape.position
        i = bisect_right(self.stamps, position, key=lambda entry: entry[0]) - 1
        if i < 0:
            return None
        _, seat, ranks, stamp = self.stamps[i]
        before = sum(entry[1] is seat for entry in self.stamps[:i])
        waiting = self._waiting
        since = waiting[1] if waiting is not None and waiting[0] == position else None
        return stamp._replace(number=seat.number + before), ranks, since

    def came(self, seat: Seat) -> int:
        """How many collectives of a seat the run has come to."""
        position = self.tape.position
        return sum(entry[1] is seat and entry[0] <= position for entry in self.stamps)

    def done(self) -> None:
        """The run has ended well: what was counted in the recording counts again."""
        for _, seat, _, _ in self.stamps:
            seat.number += 1
        for _, wire in self.exchanges:
            wire.number += 1
        self._waiting = None
