"""Totals of schedulers survive the ranks that they ran on; numbers of the moment do not."""

from __future__ import annotations

from dataclasses import fields

from narrows.sched.stats import SchedulerStats

MOMENT = {"running", "waiting", "kv_pages", "kv_pages_used", "group_running", "group_kv_pages_used"}


def numbers(start: int) -> SchedulerStats:
    """Every field another number."""
    values: dict[str, object] = {}
    for index, each in enumerate(fields(SchedulerStats), start):
        kind = str(each.type)
        values[each.name] = (index, 2 * index) if "tuple" in kind else {"rows": index} if "Map" in kind else index
    return SchedulerStats(**values)  # type: ignore[arg-type]


def test_every_total_is_that_of_both_schedulers() -> None:
    first, second = numbers(100), numbers(1000)
    both = second.after(first)
    for each in fields(SchedulerStats):
        before, after, found = (getattr(stats, each.name) for stats in (first, second, both))
        if each.name in MOMENT:
            assert found == after, each.name
        elif isinstance(after, tuple):
            assert found == tuple(x + y for x, y in zip(before, after, strict=True)), each.name
        elif isinstance(after, dict):
            assert found == {"rows": before["rows"] + after["rows"]}, each.name
        else:
            assert found == before + after, each.name


def test_bounds_that_only_one_scheduler_met_are_kept() -> None:
    first, second = numbers(1), numbers(2)
    object.__setattr__(first, "bound_steps", {"kv_pages": 3})
    assert second.after(first).bound_steps == {"kv_pages": 3, **second.bound_steps}
