"""Shares the rows of a step among prompts: equally over the attention groups that have any, by turn within each.

Every group waits for the one with the most rows, so rows of one group cost the time of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from narrows.sched.chunks import next_rows
from narrows.sched.limits import Limits
from narrows.sched.request import Request

__all__ = ["has_row_left", "share_rows"]


def share_rows(waves: Iterable[Sequence[Request]], budget: int, limits: Limits) -> dict[Request, int]:
    """Rows of prompts for one step: ``budget`` at most, ``limits.scored_rows`` of them of scored prompts.

    ``waves``: requests in the order in which they get rows; a later wave gets the rows that earlier ones leave.
    Within a wave groups have equal shares, and unused rows go to the others
    (max-min fair), to the chunk where prompts are
    not cut; rows that do not divide go to groups by the turn of their first request. A chunk that does not fit any more
    is not passed. Scored rows are shared the same way, and others of a group may pass those that wait for them.
    """
    step = _Step(budget, limits)
    for wave in waves:
        step.share(wave)
        if step.is_full:
            break
    return step.shared


def has_row_left(ahead: Sequence[int], groups: Iterable[int], budget: int) -> bool:
    """Whether a request gets a row in one of these groups, where this many rows are wanted before it in each group."""
    least = min((ahead[group] for group in groups), default=None)
    return least is not None and sum(min(rows, least) for rows in ahead) < budget


class _Step:
    """The rows of prompts of a step while they are shared out."""

    def __init__(self, budget: int, limits: Limits) -> None:
        self.shared: dict[Request, int] = {}
        self.is_full = not budget
        self._limits = limits
        self._budget, self._scored = budget, limits.scored_rows
        self._has = [0] * limits.num_groups

    def share(self, wave: Sequence[Request]) -> None:
        """Rounds, in each of which groups have equal shares of what is left, until no row can be given any more."""
        queues: dict[int, list[Request]] = {}
        for request in wave:
            queues.setdefault(request.group, []).append(request)
        before = self._budget + 1
        while queues and not self.is_full and self._budget < before:
            before = self._budget
            share = max(before // len(queues), 1)
            scoring = sum(any(request.scores_prompt for request in queue) for queue in queues.values())
            scored = max(self._scored // max(scoring, 1), 1)
            for group in sorted(queues, key=self._has.__getitem__):  # equal ones by turn, as the wave is
                if not self.is_full:
                    self._serve(queues[group], share, scored)
            queues = {group: left for group, queue in queues.items() if (left := [*filter(self._left, queue)])}

    def _serve(self, queue: Sequence[Request], share: int, scored: int) -> None:
        """One group's share of a round, ``scored`` of it for scored prompts; one chunk if chunks are larger than it."""
        room, has_any = share, False
        for request in queue:
            rows = self._take(request, min(room, scored) if request.scores_prompt else room, whole=not has_any)
            room, has_any = room - rows, has_any or rows > 0
            if self.is_full or room <= 0 or (self._left(request) and not self._may_be_passed(request)):
                return
            if request.scores_prompt:
                scored = 0 if self._left(request) else scored - rows

    def _may_be_passed(self, request: Request) -> bool:
        """Whether it is scored rows that it waits for."""
        return request.scores_prompt and next_rows(request, self._budget, self._limits, self.shared.get(request, 0)) > 0

    def _take(self, request: Request, room: int, *, whole: bool) -> int:
        """Rows for it, so many at most; with ``whole`` its next chunk at least, if the step has room for that."""
        most = min(self._budget, self._scored) if request.scores_prompt else self._budget
        begun, rows = self.shared.get(request, 0), 0
        while begun + rows < request.rows_left:
            chunk = next_rows(request, min(room, most) - rows, self._limits, begun + rows)
            if not chunk and whole and not rows:
                chunk = self._next_chunk(request, most, begun)
            if not chunk:
                break
            rows += chunk
        if rows:
            self.shared[request] = begun + rows
            self._has[request.group] += rows
            self._budget -= rows
            self._scored -= rows if request.scores_prompt else 0
            self.is_full = self.is_full or not self._budget
        return rows

    def _next_chunk(self, request: Request, most: int, begun: int) -> int:
        """Its next chunk if the step has room for it; else it waits, and those behind it do too."""
        chunk = next_rows(request, most, self._limits, begun)
        if not chunk and next_rows(request, self._budget, self._limits, begun):
            self._scored = 0  # only those that score wait
        elif not chunk:
            self.is_full = True
        return chunk

    def _left(self, request: Request) -> int:
        """Rows that it wants yet."""
        return request.rows_left - self.shared.get(request, 0)
