"""Predicted seconds of a step at the context that its rows really have.

The plans of a cache are priced at one context (:mod:`narrows.plan.cache`), which is right for the choice among them.
Attention over longer texts takes longer than that, and by no fault of the prices.
"""

from __future__ import annotations

from dataclasses import replace

from narrows.plan.cache import bucket, share_of_plan
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.plan.reprice import Repricer
from narrows.sched.batch import Batch

__all__ = ["ContextPrices", "mean_context"]


def mean_context(batch: Batch) -> int:
    """Tokens of the text that a row belongs to, as far as it has run after the step; the mean over rows."""
    total = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens)) for group in batch.groups for chunk in group)
    return round(total / max(batch.num_rows, 1))


class ContextPrices:
    """Prices the plans of one planner at longer contexts; each plan once per bucket of contexts."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._repricers: dict[int, Repricer] = {}
        self._further: dict[tuple[int, int], float] = {}

    def seconds(self, plan: Plan, batch: Batch) -> float:
        """What ``plan``, one of the planner's, predicts for ``batch``, which may have fewer rows than its bucket."""
        seconds, context = plan.seconds, mean_context(batch)
        if context > plan.shape.context:
            seconds += self._further_seconds(plan, bucket(context))
        return seconds * share_of_plan(plan, batch)

    def _further_seconds(self, plan: Plan, context: int) -> float:
        key = id(plan), context
        if key not in self._further:
            repricer = self._repricers.get(id(plan))
            if repricer is None:  # it keeps the plan, so that no other gets its identity
                repricer = self._repricers[id(plan)] = Repricer(plan, self._planner.graph(plan.layout_name))
            longer = replace(plan.shape, context=context)
            ps = sum(repricer.at(self._planner.deployment.pricer(longer)).values()) + plan.host_overhead.ps - plan.ps
            self._further[key] = max(ps, 0) * 1e-12
        return self._further[key]
