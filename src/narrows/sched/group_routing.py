"""Chooses the attention group for a request, if any has room for it now.

A group has room if it can hold all tokens that the request has, and one page more for each of its requests that may
still need one. So running requests continue for the length of a page before one is preempted. A group without
requests has room for any request that was accepted at all. Where no group has room, it also finds the requests that
have to be put back to make some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from narrows.sched.limits import Limits
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.request import Request

__all__ = ["Placement", "choose_hold", "choose_placement", "choose_yielding", "pages_lacking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A group, and the cached pages there that the request's text begins with."""

    group: int
    found: tuple[int, ...]


def choose_placement(
    request: Request,
    pools: Sequence[PagePool],
    running: Sequence[Sequence[Request]],
    limits: Limits,
    closed: Container[int] = (),
) -> Placement | None:
    """The group that then has the least to compute: rows of prompts, the request's own that its cache does not hold
    among them, and ``limits.decode_weight`` for each running request.

    So a cached prefix attracts as far as it saves rows. At a tie: the fewest tokens, then the first. Only groups with
    room that are not ``closed`` count; None if no group does.
    """
    hashes = request.hashes_of(_most_found(request, limits), limits.page_size)
    best: tuple[tuple[int, int, int], Placement] | None = None
    for group, pool in enumerate(pools):
        if group in closed or len(running[group]) >= limits.requests_per_group:
            continue
        found = pool.find(hashes)
        if _lacking(request, found, pool, running[group], limits.page_size) > 0:
            continue
        rows = request.num_tokens - len(found) * limits.page_size + _rows_to_compute(running[group])
        load = sum(other.num_tokens for other in running[group])
        key = rows + limits.decode_weight * len(running[group]), load, group
        if best is None or key < best[0]:
            best = key, Placement(group=group, found=found)
    return best and best[1]


def _rows_to_compute(running: Sequence[Request]) -> int:
    return sum(other.rows_left for other in running if not other.prefilled)


def choose_hold(
    request: Request,
    pools: Sequence[PagePool],
    running: Sequence[Sequence[Request]],
    limits: Limits,
    closed: Container[int],
) -> int:
    """The group that lacks the fewest pages for it, of those that are not ``closed``; at a tie the first."""
    groups = (group for group in range(limits.num_groups) if group not in closed)
    return min(groups, key=lambda group: pages_lacking(request, group, pools, running, limits))


def pages_lacking(
    request: Request, group: int, pools: Sequence[PagePool], running: Sequence[Sequence[Request]], limits: Limits
) -> int:
    """Pages that the group has too few for it; 0 or less: it has room."""
    found = pools[group].find(request.hashes_of(_most_found(request, limits), limits.page_size))
    return _lacking(request, found, pools[group], running[group], limits.page_size)


def _most_found(request: Request, limits: Limits) -> int:
    """Pages that may be taken from the cache: full ones before the last token, which must run to give logits.

    Of a prompt that is to be scored, only rows that were scored before a preemption can be left out.
    """
    if not limits.prefix_cache:
        return 0
    tokens = request.num_tokens - 1
    return (min(tokens, request.num_scored) if request.scores_prompt else tokens) // limits.page_size


def choose_yielding(
    request: Request,
    may_yield: Sequence[Request],
    pools: Sequence[PagePool],
    running: Sequence[Sequence[Request]],
    limits: Limits,
) -> tuple[Request, ...]:
    """The fewest running requests of one group without which it has room; empty if no group can have any.

    ``may_yield``: in the order in which they are to be put back. At a tie the first group's.
    """
    hashes = request.hashes_of(_most_found(request, limits), limits.page_size)
    chosen: tuple[Request, ...] = ()
    for group, pool in enumerate(pools):
        others = [other for other in may_yield if other.group == group]
        found = _enough(request, others, pool, running[group], pool.find(hashes), limits)
        if found and (not chosen or len(found) < len(chosen)):
            chosen = found
    return chosen


def _enough(
    request: Request,
    may_yield: Sequence[Request],
    pool: PagePool,
    running: Sequence[Request],
    found: tuple[int, ...],
    limits: Limits,
) -> tuple[Request, ...]:
    """The first of ``may_yield`` without which the group has room; empty if all of them are not enough."""
    size = limits.page_size
    pages = num_pages_for(request.num_tokens, size)
    spare, num_left = sum(other.may_grow(len(other.pages), size) for other in running), len(running)
    given_up: Counter[int] = Counter()
    free = set[int]()
    if pool.num_free + sum(len(other.pages) for other in may_yield) < pages - len(found):
        return ()
    for count, other in enumerate(may_yield, 1):
        spare, num_left = spare - other.may_grow(len(other.pages), size), num_left - 1
        given_up.update(other.pages)
        free.update(page for page in other.pages if given_up[page] == pool.num_holders(page))
        unheld = pool.num_unheld(found) + sum(page in free for page in found)
        needed = pages - len(found) + unheld + (spare + request.may_grow(pages, size) if num_left else 0)
        if num_left < limits.requests_per_group and pool.num_free + len(free) >= needed:
            return tuple(may_yield[:count])
    return ()


def _lacking(
    request: Request, found: tuple[int, ...], pool: PagePool, others: Sequence[Request], page_size: int
) -> int:
    """Pages that a group has too few for it; 0 or less: it has room."""
    pages = num_pages_for(request.num_tokens, page_size)
    spare = 0
    if others:
        spare = sum(other.may_grow(len(other.pages), page_size) for other in others)
        spare += request.may_grow(pages, page_size)
    return pages - len(found) + spare - (pool.num_free - pool.num_unheld(found))
