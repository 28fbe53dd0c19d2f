"""The row counts at which the best layout changes: a sweep over row counts, then bisection to the exact count.

Weights stay sharded as the planner has them, because a deployment loads its weights once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import split_evenly
from narrows.plan.planner import Planner
from narrows.plan.report.explain import describe

__all__ = ["RowRange", "Sweep", "row_ranges", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """From ``first`` to ``last`` rows of a step, ``best`` is the best."""

    first: int
    last: int
    best: str


def row_ranges(best_at: Callable[[int], str], top: int) -> tuple[RowRange, ...]:
    """What is best from 1 to ``top`` rows.

    ``best_at`` is called at 1, 2, 4 ... and ``top``; between two that differ the count where it changes is found by
    bisection. A stretch that begins and ends between two of those counts is not seen. Where the best changes to and
    fro, as it does near a change because some rows do not divide the ranks, stretches that are shorter than a tenth of
    their first count are taken to belong to the one before.

    >>> row_ranges(lambda rows: "few" if rows < 777 else "many", 4096)
    (RowRange(first=1, last=776, best='few'), RowRange(first=777, last=4096, best='many'))
    """
    ask = cache(best_at)
    firsts: list[int] = [1]

    def split(low: int, high: int) -> None:
        if ask(low) == ask(high):
            return
        if high - low == 1:
            firsts.append(high)
            return
        middle = (low + high) // 2
        split(low, middle)
        split(middle, high)

    grid = [1 << power for power in range(top.bit_length()) if 1 << power < top] + [top]
    for low, high in pairwise(grid):
        split(low, high)
    ranges: list[RowRange] = []
    for first, end in zip(firsts, [*firsts[1:], top + 1], strict=True):
        best = ask(first)
        if ranges and (ranges[-1].best == best or (10 * (end - first) < first and end <= top)):
            ranges[-1] = replace(ranges[-1], last=end - 1)
        else:
            ranges.append(RowRange(first=first, last=end - 1, best=best))
    return tuple(ranges)


def spread(rows: int, like: tuple[int, ...]) -> tuple[int, ...]:
    """``rows`` over attention groups, in the proportions of ``like``, which itself comes out unchanged.

    >>> spread(9, (5, 4)), spread(10, (300, 100)), spread(7, (2, 0))
    ((5, 4), (7, 3), (7, 0))
    """
    total = sum(like)
    if like == split_evenly(total, len(like)):
        return split_evenly(rows, len(like))
    seen, taken = 0, 0
    counts = []
    for n in like:
        seen += n
        counts.append(rows * seen // total - taken)
        taken += counts[-1]
    return tuple(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The steps that are swept: those like ``shape`` in phase, context and spread over groups, up to ``top`` rows.

    ``logit_rows`` is the number of rows with logits where it was given, at most all.
    """

    shape: StepShape
    top: int
    logit_rows: int | None = None

    def at(self, rows: int) -> StepShape:
        """The step of so many rows."""
        like = self.shape
        logit_rows = None if self.logit_rows is None else min(self.logit_rows, rows)
        groups = spread(rows, like.group_rows)
        return StepShape.of(like.rows.mesh, groups, phase=like.phase, context=like.context, logit_rows=logit_rows)

    def named(self, planner: Planner, names: Sequence[str]) -> tuple[RowRange, ...]:
        """Which of the layouts ``names`` is cheapest; of equals the one named first.

        Raises:
            ConfigError: no names, or one that cannot apply.
        """
        if not names:
            raise ConfigError("a sweep needs at least one layout")
        if len(names) == 1:
            return (RowRange(first=1, last=self.top, best=names[0]),)

        def best_at(rows: int) -> str:
            shape = self.at(rows)
            return min(names, key=lambda name: planner.ps(shape, name))

        return row_ranges(best_at, self.top)

    def auto(self, planner: Planner) -> tuple[RowRange, ...]:
        """How rows travel in the cheapest plan, in words."""
        return row_ranges(lambda rows: describe(planner.plan(self.at(rows))), self.top)
