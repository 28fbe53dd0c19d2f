"""The requests that wait and run, with their attention groups and pages.

Requests come, are admitted, grow, are put back to wait again, and leave. Pages, shares and turns stay consistent.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from narrows.sched.group_routing import Placement
from narrows.sched.limits import Limits
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.request import Request
from narrows.sched.shares import Shares
from narrows.sched.stats import Totals

__all__ = ["RequestTable"]

_TURN = attrgetter("turn")


class RequestTable:
    """``waiting`` and each group of ``running`` are in the order of turns; ``pools`` are the groups' pages."""

    def __init__(self, limits: Limits, totals: Totals) -> None:
        self.limits, self._totals = limits, totals
        self.waiting: list[Request] = []
        self.running: list[list[Request]] = [[] for _ in range(limits.num_groups)]
        self.pools = [PagePool(limits.pages_per_group) for _ in range(limits.num_groups)]
        self.shares = Shares(limits)

    def order(self, *more: Request) -> list[Request]:
        """The running requests, and ``more`` as if they ran, in the order in which they get rows."""
        return self.shares.order([*(request for group in self.running for request in group), *more])

    def is_full(self, group: int) -> bool:
        """Whether the group has as many requests as it may."""
        return len(self.running[group]) >= self.limits.requests_per_group

    def wait(self, request: Request) -> None:
        """A request has come."""
        insort(self.waiting, request, key=_TURN)
        self.shares.came(request)

    def place(self, request: Request, placement: Placement) -> None:
        """One that waited runs from now on."""
        self.waiting.remove(request)
        pool = self.pools[placement.group]
        pool.share(placement.found)
        count = num_pages_for(request.num_tokens, self.limits.page_size) - len(placement.found)
        request.group, request.pages = placement.group, [*placement.found, *pool.take(count)]
        request.num_registered = len(placement.found)
        request.num_found = request.num_cached = len(placement.found) * self.limits.page_size
        request.holds = -1
        insort(self.running[placement.group], request, key=_TURN)
        self.shares.placed(request)

    def put_back(self, request: Request) -> None:
        """Give up its pages; it waits for its turn to run all its tokens again."""
        self.release(request)
        self.running[request.group].remove(request)
        self._totals.preemptions[request.group] += 1
        request.group = -1
        request.num_cached = request.num_found = 0
        insort(self.waiting, request, key=_TURN)
        self.shares.put_back(request, self._totals.steps)

    def leave(self, request: Request) -> None:
        """It has ended."""
        self.shares.ended(request, self._totals.steps, ran=request.group >= 0)
        if request.group < 0:
            self.waiting.remove(request)
        else:
            self.release(request)
            self.running[request.group].remove(request)

    def grow(self, request: Request, order: Sequence[Request]) -> bool:
        """Pages for its next row; False if it was preempted for lack of them.

        A preempted request is later in the order than all that have rows in this step, which are served in that order.
        """
        pool = self.pools[request.group]
        count = num_pages_for(request.num_cached + 1, self.limits.page_size) - len(request.pages)
        if count > pool.num_free:
            for other in self.running[request.group]:
                if other.is_through:  # nothing of it is to run: its pages serve no request
                    self.release(other)
        while count > pool.num_free:
            last = next(other for other in reversed(order) if other.group == request.group and not other.is_through)
            self._totals.short_of_pages(request.group)
            self.put_back(last)
            if last is request:
                return False
        request.pages += pool.take(count)
        return True

    def release(self, request: Request) -> None:
        """Its pages are free; those that are full can be found until their room is needed."""
        self.register(request)
        self.pools[request.group].give_back(request.pages)
        request.pages = []
        request.num_registered = 0

    def register(self, request: Request) -> None:
        """Let its full pages be found: those whose tokens are known, and whose rows have been scheduled all."""
        if not self.limits.prefix_cache or not request.pages:
            return
        num_full = min(request.num_cached, request.num_known) // self.limits.page_size
        hashes = request.hashes_of(num_full, self.limits.page_size)
        for page in range(request.num_registered, num_full):
            self.pools[request.group].register(request.pages[page], hashes[page])
        request.num_registered = max(request.num_registered, num_full)
