"""Finds the ranks that keep the others waiting at a collective, from the ranks' heartbeats. Three rules:

- *overdue*: a rank has waited ``timeout_s`` at a collective that other members of its group have not entered.
- *slow*: all members have waited ``timeout_s`` at one collective, which all have entered: what carries it is too slow.
- *stuck*: ranks wait for each other. A rank is idle if it has done all its calls. It waits in vain if a rank that it
  waits for is idle or waits in vain. If that has been so for ``stuck_s`` for all ranks involved, none will go on,
  however long ``timeout_s`` is. This is how "one rank idle and one not" ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from narrows.comm.fingerprint import Fingerprint, absence, rank_names
from narrows.ranks.timing import TIMING

__all__ = ["Report", "Watchdog"]


class Report(NamedTuple):
    """The content of a rank's heartbeat."""

    done: int = 0
    """Calls that it has done."""
    came: tuple[tuple[tuple[int, ...], int], ...] = ()
    """For each group, how many of its collectives the rank has entered."""
    last: tuple[Fingerprint, tuple[int, ...]] | None = None
    """The collective that it entered last, and the group of that collective."""
    waits: bool = False
    """Whether it is still in that collective."""
    age_s: float = 0.0
    """For how long it has been there."""


class Watchdog:
    """The latest report of every rank of a mesh. Times are any clock's, the same in every call."""

    def __init__(self, size: int, timeout_s: float, stuck_s: float = TIMING.stuck_s) -> None:
        self.timeout_s, self.stuck_s = timeout_s, stuck_s
        self._reports = [Report()] * size
        self._heard = [float("-inf")] * size
        self._since = [float("inf")] * size  # when a report last differed from the one before

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Takes a rank's report."""
        if self._since[rank] == float("inf") or report._replace(age_s=0.0) != self._reports[rank]._replace(age_s=0.0):
            self._since[rank] = now
        self._reports[rank], self._heard[rank] = report, now

    def verdict(self, num_calls: int, now: float) -> tuple[list[int], str] | None:
        """The ranks that keep the others waiting, and a sentence that says so; None while all may be well.

        ``num_calls``: calls that every rank was given so far.
        """
        return self._overdue() or self._stuck(num_calls, now)

    def missing(self, rank: int) -> list[int]:
        """The ranks that ``rank`` waits for: they have not entered the collective that it is in."""
        report = self._reports[rank]
        if report.last is None or not report.waits:
            return []
        fingerprint, ranks = report.last
        return [other for other in ranks if dict(self._reports[other].came).get(ranks, 0) <= fingerprint.number]

    def waiting_for(self, ranks: Sequence[int]) -> str:
        """The ranks that wait at collectives of ``ranks``, and at which; empty if none does.

        ``ranks`` may have entered the collective themselves, and be in the middle of it.
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
            # Older reports are no evidence. A rank that reports no more is named for its silence.
            if missing and all(self._heard[other] >= due for other in missing):
                return missing, f"did not come within {self.timeout_s:g} s; {self._evidence(rank, missing)}"
            if not missing and self._all_wait(rank):
                assert report.last is not None
                fingerprint, ranks = report.last
                why = "the network between their hosts is slow, or loses what they send"
                return list(ranks), f"all came to {fingerprint}, which was not done within {self.timeout_s:g} s: {why}"
        return None

    def _all_wait(self, rank: int) -> bool:
        """Whether all members have waited ``timeout_s`` where ``rank`` waits."""
        last = self._reports[rank].last
        assert last is not None
        there = [self._reports[other] for other in last[1]]
        return all(
            report.waits
            and report.age_s >= self.timeout_s
            and report.last is not None
            and (report.last[0].number, report.last[1]) == (last[0].number, last[1])
            for report in there
        )

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
            return None  # it entered later and cannot go on either: the order must not decide which is named
        for rank in sorted(stuck):
            if self._reports[rank].waits:
                missing = [other for other in self.missing(rank) if other in stuck]
                return missing, f"will not come; {self._evidence(rank, missing)}"
        return None

    def _evidence(self, rank: int, missing: list[int]) -> str:
        """The ranks that wait where ``rank`` waits, and the last collective of each missing one."""
        last = self._reports[rank].last
        assert last is not None
        fingerprint, ranks = last
        there = []
        for other in ranks:
            at = self._reports[other].last
            if self._reports[other].waits and at is not None and (at[0].number, at[1]) == (fingerprint.number, ranks):
                there.append((other, at[0]))
        text = absence(there, {other: self._reports[other].last for other in missing})
        past = [other for other in missing if self._reports[other].done > self._reports[rank].done]
        return f"{text}; {rank_names(past)} had ended that call" if past else text
