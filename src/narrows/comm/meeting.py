"""Where threads of one process meet: each brings something, waits for the others, and leaves with all that was brought.

Knows ranks, stamps, and how long others may take. Does not know what is brought, what the collective is, or how a
rank thread is started. One wake-up per waiting thread: the last to come opens the gate of each of the others, which
took half the time of a ``threading.Barrier`` or less where it was measured (2 cores, 8 threads).
"""

from __future__ import annotations

import threading
from typing import Any

from narrows.comm.stamps import Stamp, rank_names
from narrows.errors import RankError
from narrows.layout import Mesh

__all__ = ["Commons", "Meeting"]


class Commons:
    """What the rank threads of one world share: their meetings, the first failure, and where each rank was last."""

    def __init__(self, mesh: Mesh, *, checked: bool, timeout_s: float) -> None:
        self.mesh = mesh
        self.checked = checked
        self.timeout_s = timeout_s
        self.failure: tuple[int | None, BaseException] | None = None
        self.last: list[tuple[Stamp, tuple[int, ...]] | None] = [None] * mesh.size
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], Meeting] = {}

    def meeting(self, ranks: tuple[int, ...]) -> Meeting:
        """The one meeting of this group."""
        with self._lock:
            if ranks not in self._meetings:
                self._meetings[ranks] = Meeting(self, ranks)
            return self._meetings[ranks]

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Ends every meeting, present and future, with this error; only the first call counts.

        ``rank`` is None when no rank failed, but the owner closes the world.
        """
        with self._lock:
            if self.failure is not None:
                return
            if rank is not None:
                error.add_note(f"The first error on {self.mesh}: it was raised on rank {rank}.")
            self.failure = (rank, error)
            meetings = list(self._meetings.values())
        for meeting in meetings:
            meeting.abandon()

    def rank_error(self) -> RankError:
        """What a rank raises that did not fail itself."""
        assert self.failure is not None
        rank, error = self.failure
        told = RankError(str(error) if rank is None else f"rank {rank} failed first: {type(error).__name__}: {error}")
        told.__cause__ = error
        return told

    def overdue(self, rank: int, waiting: list[tuple[int, Stamp]], ranks: tuple[int, ...]) -> RankError:
        """``rank`` has waited long enough: names who is missing and where those were last, and what the others wait at.

        Returns what ``rank`` is to raise: the error that names the missing, or the one of a rank that failed before.
        """
        present = [other for other, _ in waiting]
        missing = [other for other in ranks if other not in present]
        told = [f"{rank_names(missing)} did not come within {self.timeout_s:g} s"]
        told += [f"rank {other} waits at {stamp}" for other, stamp in waiting]
        for other in missing:
            last = self.last[other]
            told.append(
                f"rank {other} last came to {last[0]} of {rank_names(last[1])}" if last else f"rank {other} never came"
            )
        error = RankError("; ".join(told))
        self.fail(rank, error)
        assert self.failure is not None
        return error if self.failure[1] is error else self.rank_error()


class _Round:
    """One time that a group meets. It is left behind whole, so that no later round can disturb a slow reader."""

    __slots__ = ("brought", "missing")

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.missing = size


class Meeting:
    """The rendezvous of one group of ranks."""

    def __init__(self, commons: Commons, ranks: tuple[int, ...]) -> None:
        self._commons = commons
        self._ranks = ranks
        self._lock = threading.Lock()
        self._round = _Round(len(ranks))
        self._waiting: list[Stamp | None] = [None] * len(ranks)
        self._gates = [threading.Lock() for _ in ranks]  # locked, except from the opening until the waiter is through
        for gate in self._gates:
            gate.acquire()

    def meet(self, me: int, stamp: Stamp, thing: Any) -> list[Any]:
        """Bring ``thing`` as member ``me``; returns what every member brought, in rank order, once all have come.

        Raises:
            RankError: a rank of the world failed, or a member did not come in time.
        """
        with self._lock:
            if self._commons.failure is not None:
                raise self._commons.rank_error()
            self._commons.last[self._ranks[me]] = (stamp, self._ranks)
            round_ = self._round
            round_.brought[me] = thing
            round_.missing -= 1
            if not round_.missing:
                self._round = _Round(len(self._ranks))
                self._open()
                return round_.brought
            self._waiting[me] = stamp
        if not self._gates[me].acquire(timeout=self._commons.timeout_s):
            self._overdue(me)
        if round_.missing:
            raise self._commons.rank_error()
        return round_.brought

    def abandon(self) -> None:
        """Lets everyone who waits go, without what they came for."""
        with self._lock:
            self._open()

    def _open(self) -> None:
        for i, stamp in enumerate(self._waiting):
            if stamp is not None:
                self._waiting[i] = None
                self._gates[i].release()

    def _overdue(self, me: int) -> None:
        """Raises, unless the gate was opened just now."""
        with self._lock:
            if self._waiting[me] is None:
                self._gates[me].acquire()
                return
            waiting = [(rank, stamp) for rank, stamp in zip(self._ranks, self._waiting, strict=True) if stamp]
        raise self._commons.overdue(self._ranks[me], waiting, self._ranks)
