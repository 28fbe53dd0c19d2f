"""Statistics of the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from operator import add
from typing import Any

from narrows.sched.request import Request

__all__ = ["Bound", "SchedulerStats", "Totals"]


class Bound(StrEnum):
    """The limit that keeps a request from rows in a step: rows, requests per group, or KV pages."""

    ROWS = "rows"
    REQUESTS = "requests"
    KV_PAGES = "kv_pages"


_OF_THIS_MOMENT = frozenset(("running", "waiting", "kv_pages", "kv_pages_used", "group_running", "group_kv_pages_used"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """``running``, ``waiting``, ``kv_*``, ``group_running`` and ``group_kv_*`` are current values, the rest totals.

    ``kv_pages`` of all groups, the null pages not counted; ``kv_pages_used``: held by requests (pages that are only
    kept to be found again are not used). ``prompt_tokens`` of prompts that have begun to run, ``cached_prompt_tokens``
    of them found in the prefix cache. ``bound_steps``: steps in which a request got fewer rows than it wanted, or did
    not run, by what there was too little of.

    By group: ``idle_rows``, summed over steps, the rows of the step's largest group less its own, since every group
    waits for the largest; ``short_steps``, steps in which it had too few pages for one of its requests, or for one that
    found no room in any group.
    """

    running: int
    waiting: int
    kv_pages: int
    kv_pages_used: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    steps: int
    idle_rows: tuple[int, ...]
    group_running: tuple[int, ...] = ()
    group_kv_pages_used: tuple[int, ...] = ()
    group_preemptions: tuple[int, ...] = ()
    short_steps: tuple[int, ...] = ()
    bound_steps: Mapping[str, int] = field(default_factory=dict)

    def after(self, before: SchedulerStats) -> SchedulerStats:
        """These numbers of a scheduler that took the place of another: the totals of both, and this one's moment."""
        totals = [each.name for each in fields(self) if each.name not in _OF_THIS_MOMENT]
        return replace(self, **{name: _sum(getattr(self, name), getattr(before, name)) for name in totals})


def _sum(first: Any, second: Any) -> Any:
    """Of two numbers, or of each pair of numbers by index or by key."""
    if isinstance(first, Mapping):
        return {key: first.get(key, 0) + second.get(key, 0) for key in {**second, **first}}
    return tuple(map(add, first, second)) if isinstance(first, tuple) else first + second


class Totals:
    """Counts of one scheduler, and the limits that bind in the current step."""

    def __init__(self, num_groups: int) -> None:
        self.steps = self.prompt_tokens = self.cached_prompt_tokens = self.output_tokens = 0
        self.preemptions = [0] * num_groups
        self.idle_rows = [0] * num_groups
        self.short_steps = [0] * num_groups
        self.bound_steps = Counter[Bound]()
        self._binds = set[Bound]()
        self._short = set[int]()

    def begin_step(self) -> None:
        """Nothing binds yet."""
        self._binds.clear()
        self._short.clear()

    def binds(self, what: Bound) -> None:
        """A request gets no row, or does not run, in this step for want of it."""
        self._binds.add(what)

    def short_of_pages(self, group: int) -> None:
        """The group has too few pages in this step."""
        self._binds.add(Bound.KV_PAGES)
        self._short.add(group)

    def begun(self, request: Request) -> None:
        """Its first rows are scheduled."""
        self.prompt_tokens += len(request.prompt)
        self.cached_prompt_tokens += request.num_cached_prompt

    def stepped(self, group_rows: Sequence[int]) -> None:
        """The step is made."""
        self.steps += 1
        self.bound_steps.update(self._binds)
        for group, rows in enumerate(group_rows):
            self.idle_rows[group] += max(group_rows) - rows
            self.short_steps[group] += group in self._short
