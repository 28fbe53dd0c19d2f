"""Which attention group a request goes to, if any has room for it now. Ints only; looks, and takes nothing.

A group has room if it can hold all tokens that the request has, and one page more for each of its requests that may
still need one: so those that run go on for a page's length before anyone has to be put back. A group without requests
has room for any request that was accepted at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrows.sched.limits import Limits
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.request import Request

__all__ = ["Place", "choose_place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A group, the cached pages there that the request's text begins with, and the tokens that its requests have."""

    group: int
    found: tuple[int, ...]
    load: int


def choose_place(
    request: Request, pools: Sequence[PagePool], running: Sequence[Sequence[Request]], limits: Limits
) -> Place | None:
    """The group with the longest cached prefix, of those at most ``limits.load_gap`` tokens above the least loaded.

    Equal ones: the least loaded, then the first. Only groups with room count; None if there is none.
    """
    hashes = request.hashes_of(_most_found(request, limits), limits.page_size)
    places = [
        Place(group=group, found=found, load=sum(other.num_tokens for other in running[group]))
        for group, pool in enumerate(pools)
        if len(running[group]) < limits.requests_per_group
        and _has_room(request, found := pool.find(hashes), pool, running[group], limits.page_size)
    ]
    most = min((place.load for place in places), default=0) + limits.load_gap
    near = [place for place in places if place.load <= most]
    return max(near, key=lambda place: (len(place.found), -place.load, -place.group), default=None)


def _most_found(request: Request, limits: Limits) -> int:
    """Pages that may be taken from the cache: full ones before the last token, which must run to give logits.

    Of a prompt that is to be scored, only rows that were scored before a preemption can be left out.
    """
    if not limits.prefix_cache:
        return 0
    tokens = request.num_tokens - 1
    return (min(tokens, request.num_scored) if request.scores_prompt else tokens) // limits.page_size


def _has_room(
    request: Request, found: tuple[int, ...], pool: PagePool, others: Sequence[Request], page_size: int
) -> bool:
    pages = num_pages_for(request.num_tokens, page_size)
    spare = 0
    if others:
        spare = sum(other.may_grow(len(other.pages), page_size) for other in others)
        spare += request.may_grow(pages, page_size)
    return pool.num_free - pool.num_unheld(found) >= pages - len(found) + spare
