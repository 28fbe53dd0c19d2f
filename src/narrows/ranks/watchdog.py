"""Who will not come: from what every rank says of itself, twice a second, the ranks that keep the others waiting.

Knows fingerprints and clocks, as plain values; no process, no socket, no tensor. Two rules:

- *overdue*: a rank has waited ``timeout_s`` at a collective that others of its group have not come to;
- *stuck*: nobody can move. A rank is idle if it has done all its calls; it waits in vain if one that it waits for
  is idle or waits in vain. When that has been so for ``stuck_s`` for all whom it holds up, waiting longer brings
  nothing, however long ``timeout_s`` is: it is how "one rank idle and one not" ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from narrows.comm.fingerprint import Fingerprint, absence, rank_names
from narrows.ranks.timing import TIMING

__all__ = ["Report", "Watchdog"]


class Report(NamedTuple):
    """What a rank says of itself."""

    done: int = 0
    """Calls it has done."""
    came: tuple[tuple[tuple[int, ...], int], ...] = ()
    """How often it has come to a collective of each group."""
    last: tuple[Fingerprint, tuple[int, ...]] | None = None
    """The collective it came to last, and the group that meets there."""
    waits: bool = False
    """It is still there."""
    age_s: float = 0.0
    """For how long, if it is."""


class Watchdog:
    """The ranks of one world, seen from whoever hears all of them. Times are any clock's, the same in every call."""

    def __init__(self, size: int, timeout_s: float, stuck_s: float = TIMING.stuck_s) -> None:
        self.timeout_s, self.stuck_s = timeout_s, stuck_s
        self._reports = [Report()] * size
        self._heard = [float("-inf")] * size
        self._since = [float("inf")] * size  # when a report last said something new

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Takes in what ``rank`` says."""
        if self._since[rank] == float("inf") or report._replace(age_s=0.0) != self._reports[rank]._replace(age_s=0.0):
            self._since[rank] = now
        self._reports[rank], self._heard[rank] = report, now

    def verdict(self, num_calls: int, now: float) -> tuple[list[int], str] | None:
        """The ranks that keep the others waiting, and the sentence that says so; None while all may be well.

        ``num_calls``: calls that every rank was given so far.
        """
        return self._overdue() or self._stuck(num_calls, now)

    def missing(self, rank: int) -> list[int]:
        """The ranks that ``rank`` waits for: they have not come to the collective that it is in."""
        report = self._reports[rank]
        if report.last is None or not report.waits:
            return []
        fingerprint, ranks = report.last
        return [other for other in ranks if dict(self._reports[other].came).get(ranks, 0) <= fingerprint.number]

    def waiting_for(self, ranks: Sequence[int]) -> str:
        """Who waits where ``ranks`` are awaited, and at what; empty if nobody says so.

        They may have come there, and be in the middle of it: what others wait for then is that they go on.
        """
        reports = [(other, report) for other, report in enumerate(self._reports) if other not in ranks]
        there = [(other, report.last) for other, report in reports if report.last and report.waits]
        return absence(
            [(other, fingerprint) for other, (fingerprint, group) in there if not set(ranks).isdisjoint(group)], {}
        )

    def _overdue(self) -> tuple[list[int], str] | None:
        for rank, report in enumerate(self._reports):
            if not report.waits or report.age_s < self.timeout_s:
                continue
            due = self._heard[rank] - report.age_s + self.timeout_s
            missing = self.missing(rank)
            # What a rank said before that is no evidence; if it says nothing any more, its silence will tell.
            if missing and all(self._heard[other] >= due for other in missing):
                return missing, f"did not come within {self.timeout_s:g} s; {self._told(rank, missing)}"
        return None

    def _stuck(self, num_calls: int, now: float) -> tuple[list[int], str] | None:
        stuck = {
            rank
            for rank, (report, since, heard) in enumerate(zip(self._reports, self._since, self._heard, strict=True))
            if now - since >= self.stuck_s > now - heard and (report.waits or report.done >= num_calls)
        }
        while free := {
            rank for rank in stuck if self._reports[rank].waits and not stuck.intersection(self.missing(rank))
        }:
            stuck -= free
        heard = {rank for rank, heard in enumerate(self._heard) if now - heard < self.stuck_s}
        if any(stuck.intersection(self.missing(rank)) for rank in heard - stuck):
            return None  # it came later than the others, and cannot move either: who is named is not left to that
        for rank in sorted(stuck):
            if self._reports[rank].waits:
                missing = [other for other in self.missing(rank) if other in stuck]
                return missing, f"will not come; {self._told(rank, missing)}"
        return None

    def _told(self, rank: int, missing: list[int]) -> str:
        """Everyone who waits where ``rank`` waits, and where the missing ones were last."""
        last = self._reports[rank].last
        assert last is not None
        fingerprint, ranks = last
        there = []
        for other in ranks:
            at = self._reports[other].last
            if self._reports[other].waits and at is not None and (at[0].number, at[1]) == (fingerprint.number, ranks):
                there.append((other, at[0]))
        said = absence(there, {other: self._reports[other].last for other in missing})
        past = [other for other in missing if self._reports[other].done > self._reports[rank].done]
        return f"{said}; {rank_names(past)} had ended that call" if past else said
