"""Checks that the state of a scheduler is consistent; tests call it after every step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from narrows.sched.limits import Limits
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.request import Request

__all__ = ["check_integrity"]


def check_integrity(
    limits: Limits, waiting: Sequence[Request], running: Sequence[Sequence[Request]], pools: Sequence[PagePool]
) -> None:
    """Pages are free, cached, or held by running requests; found by what is in them; turns are in order."""
    for group, pool in enumerate(pools):
        pool.check_integrity(page for request in running[group] for page in request.pages)
        for request in running[group]:
            assert request.group == group and not request.finish_reason, "a request runs that should not"
            _check_pages(request, pool, limits.page_size)
    for request in waiting:
        assert request.group == -1 and not request.pages and not request.num_cached, "a waiting request holds pages"
    for queue in (waiting, *running):
        assert queue == sorted(queue, key=attrgetter("turn")), "requests are out of turn"


def _check_pages(request: Request, pool: PagePool, size: int) -> None:
    held = len(request.pages)
    assert held >= num_pages_for(request.num_cached, size) or request.is_through, "rows without a page"
    hashes = request.hashes_of(min(held, request.num_known // size), size)
    for index, page in enumerate(request.pages):
        found_by = pool.hash_of(page)
        if found_by is not None:
            assert (index + 1) * size <= request.num_cached, "a page still written can be found"
            assert found_by == hashes[index], "a page is found by what is not in it"
