"""What the scheduler has done and holds, in numbers. Knows nothing of how they come about."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SchedulerStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """``running``, ``waiting`` and ``kv_*`` are of this moment, the rest totals since the start.

    ``kv_pages`` of all groups, the null pages not counted; ``kv_pages_used``: held by requests (pages that are only
    kept to be found again are not used). ``prompt_tokens`` of prompts that have begun to run, ``cached_prompt_tokens``
    of them found in the prefix cache. ``idle_rows`` by group: summed over steps, the rows of the step's largest group
    less the group's own, since every group waits for the largest.
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
