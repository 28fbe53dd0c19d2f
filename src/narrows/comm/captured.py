"""The collectives of a captured step, kept so that they can be replayed.

Replayed exchanges read and write the memory that they used when they were captured. That memory is reserved for them
until :meth:`CapturedCollectives.close`.
"""

from __future__ import annotations

from bisect import bisect_right
from time import monotonic
from typing import Protocol

from narrows.comm.fingerprint import Fingerprint
from narrows.comm.segment import Block

__all__ = ["CapturedCalls", "CapturedCollectives"]


class CapturedCalls(Protocol):
    """Compiled calls that can be made again; see :class:`narrows.native.captured_calls.CapturedCalls`."""

    @property
    def size(self) -> int: ...

    @property
    def position(self) -> int: ...

    def rewind(self) -> None: ...

    def run(self) -> int: ...


class Member(Protocol):
    """This rank in one group; ``number`` counts its collectives there."""

    number: int
    ranks: tuple[int, ...]


class Exchanges(Protocol):
    """The exchanges of one group of ``size`` members; ``number`` counts the complete ones."""

    number: int
    size: int

    def advance(self) -> None:
        """Count one more exchange as complete."""
        ...


class CapturedCollectives:
    """Collectives and exchanges by their position among ``calls``."""

    def __init__(self, calls: CapturedCalls) -> None:
        self.calls = calls
        self.collectives: list[tuple[int, Member, Fingerprint]] = []
        """(position, group member, fingerprint as of the capture)."""
        self.exchanges: list[tuple[int, Exchanges]] = []
        """(position, group); one collective may make two exchanges."""
        self.blocks: list[Block] = []
        """Memory that the exchanges use; reserved from :meth:`end` to :meth:`close`."""
        self._waiting: tuple[int, float] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the reserved memory."""
        return sum(block.size for block in self.blocks)

    def collective(self, member: Member, fingerprint: Fingerprint) -> None:
        self.collectives.append((self.calls.size, member, fingerprint))

    def exchange(self, group: Exchanges) -> None:
        self.exchanges.append((self.calls.size, group))

    def end(self, count: int) -> None:
        """Keep what came before call ``count``, and reserve the memory."""
        self.collectives = [entry for entry in self.collectives if entry[0] < count]
        self.exchanges = [entry for entry in self.exchanges if entry[0] < count]
        self.blocks = list(dict.fromkeys(self.blocks))
        for block in self.blocks:
            block.reserved = True

    def close(self) -> None:
        """Release the blocks once all members have read what the last replay left there.

        That is after the next exchange of the largest group. If no group contains all others, the blocks stay reserved.
        """
        members = {rank for _, member, _ in self.collectives for rank in member.ranks}
        largest = max((group for _, group in self.exchanges), key=lambda group: group.size, default=None)
        if largest is not None and largest.size < len(members):
            return
        for block in self.blocks:
            block.after = None if largest is None else (largest, largest.number)
            block.reserved = False
        self.blocks = []

    def waits(self) -> None:
        """Note that the call being replayed waits for other ranks."""
        position = self.calls.position
        if self._waiting is None or self._waiting[0] != position:
            self._waiting = position, monotonic()

    def latest(self) -> tuple[Fingerprint, Member, float | None] | None:
        """The collective that the replay came to last, and since when it waits there (None: it does not wait)."""
        position = self.calls.position
        i = bisect_right(self.collectives, position, key=lambda entry: entry[0]) - 1
        if i < 0:
            return None
        _, member, fingerprint = self.collectives[i]
        before = sum(entry[1] is member for entry in self.collectives[:i])
        waiting = self._waiting
        since = waiting[1] if waiting is not None and waiting[0] == position else None
        return fingerprint._replace(number=member.number + before), member, since

    def came(self, member: Member) -> int:
        """How many collectives of one group the replay has come to."""
        position = self.calls.position
        return sum(entry[1] is member and entry[0] <= position for entry in self.collectives)

    def done(self) -> None:
        """Count the collectives and exchanges of a replay that has ended well."""
        for _, member, _ in self.collectives:
            member.number += 1
        for _, group in self.exchanges:
            group.advance()
        self._waiting = None
