"""The queue of waiting requests: which one runs in the next step, and which running ones are preempted for it.

Requests are admitted by turn while the step has a row for one more. A request for which no group has room reserves the
group that lacks the fewest pages: until it runs, no request behind it is admitted there. So it waits no longer than if
none passed it, and a group that is short of pages does not stall the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from narrows.sched.group_routing import choose_hold, choose_placement, choose_yielding, pages_lacking
from narrows.sched.prompt_rows import has_row_left
from narrows.sched.request import Request
from narrows.sched.request_table import RequestTable
from narrows.sched.stats import Bound, Totals

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """The requests that wait to run."""

    def __init__(self, table: RequestTable, totals: Totals) -> None:
        self._table, self._totals, self._limits = table, totals, table.limits

    def admit(self, budget: int) -> None:
        """Admit as many as get a row of a step with so many rows for prompts."""
        table, groups = self._table, range(self._limits.num_groups)
        full, held = {group for group in groups if table.is_full(group)}, set[int]()
        passed: list[Request] = []
        while len(passed) < len(groups):
            closed = full | held
            found = self._next(budget, [group for group in groups if group not in closed] or groups, passed)
            if found is None:
                return
            request, _ = found
            placement = choose_placement(request, table.pools, table.running, self._limits, closed)
            if placement is not None:
                table.place(request, placement)
                if table.is_full(placement.group):
                    full.add(placement.group)
                continue
            self._note_want(request)
            if len(closed) == len(groups):
                return
            if request.holds < 0 or request.holds in held:
                request.holds = choose_hold(request, table.pools, table.running, self._limits, closed)
            held.add(request.holds)
            passed.append(request)
            if len(full | held) == len(groups):
                return

    def _note_want(self, request: Request) -> None:
        """Count the limits that keep it waiting."""
        for group in range(self._limits.num_groups):
            if pages_lacking(request, group, self._table.pools, self._table.running, self._limits) > 0:
                self._totals.short_of_pages(group)
            elif self._table.is_full(group):
                self._totals.binds(Bound.REQUESTS)

    def make_room(self) -> None:
        """Place requests of clients that run fewer than others; if need be, others' are put back for them.

        Before any request has rows, so that one that is put back has none in this step.
        """
        table, groups = self._table, range(self._limits.num_groups)
        while table.shares.compete and (found := self._next(None, groups, ())) is not None:
            request, order = found
            may_yield = [other for other in reversed(order) if self._yields(other, request)]
            if not may_yield:
                return
            placement = choose_placement(request, table.pools, table.running, self._limits)
            if placement is None:
                for other in choose_yielding(request, may_yield, table.pools, table.running, self._limits):
                    table.put_back(other)
                placement = choose_placement(request, table.pools, table.running, self._limits)
            if placement is None:
                return
            table.place(request, placement)

    def _yields(self, running: Request, waiting: Request) -> bool:
        """Whether it may be put back for the other: its client keeps as many as the other's client then has, or more.

        Never for one that is less urgent.
        """
        fewest = self._table.shares.running(waiting.client) + 1
        return running.rank >= fewest and running.priority >= waiting.priority and not running.is_through

    def _next(
        self, budget: int | None, groups: Sequence[int], passed: Collection[Request]
    ) -> tuple[Request, list[Request]] | None:
        """Whose turn it is, and the order with it among those that run; None: no turn, or ``groups`` have no row left.

        ``budget``: rows for prompts; None: the next step's, less fair shares. ``passed``: it is none of these.
        """
        table, scored_rows = self._table, self._limits.scored_rows
        scores_wait = False
        while True:
            line = (each for each in table.waiting if each not in passed and not (scores_wait and each.scores_prompt))
            request = table.shares.first(line)
            if request is None:
                return None
            request.since = table.shares.since(request)
            order = table.order(request)
            plain, scored = _rows_ahead(order, request, self._limits.num_groups)
            rows = table.shares.row_shares(order).for_prompts if budget is None else budget
            ahead = [count + min(more, scored_rows) for count, more in zip(plain, scored, strict=True)]
            if not has_row_left(ahead, groups, rows):
                if budget is not None:
                    self._totals.binds(Bound.ROWS)
                return None
            if not request.scores_prompt or sum(scored) < scored_rows:
                return request, order
            scores_wait = True  # for the budget of scored prompts; others have room


def _rows_ahead(order: Sequence[Request], request: Request, num_groups: int) -> tuple[list[int], list[int]]:
    """Rows of prompts that come before it in the order, by group: of plain ones, and of scored ones."""
    plain, scored = [0] * num_groups, [0] * num_groups
    for other in order[: order.index(request)]:
        if other.rows_left and other.wants_rows:
            (scored if other.scores_prompt else plain)[other.group] += other.rows_left
    return plain, scored
