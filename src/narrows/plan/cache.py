"""The plan cache: plans by bucketed row counts, so that a step looks up its plan instead of searching for it.

A key has the rows in total, the rows of the largest group, the rows with logits, and the phase. The plan of a bucket is
priced at the bucket's upper end and runs any step that falls into it: a plan says which operations run, and the row
counts of a real step come with its row split.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from narrows.cost.pricer import StepShape
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.sched.batch import Batch

__all__ = ["FixedPlan", "PlanCache", "PlanKey", "bucket", "share_of_plan"]

_BUCKETS = tuple(sorted({m * 2**e for e in range(21) for m in (2, 3)} | {0, 1}))


def bucket(n: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is at least ``n``.

    >>> [bucket(n) for n in (0, 1, 5, 16, 1023)]
    [0, 1, 6, 16, 1024]
    """
    return _BUCKETS[bisect_left(_BUCKETS, n)]


@dataclass(frozen=True, slots=True, order=True)
class PlanKey:
    """What a plan is cached by: bucketed row counts and the phase."""

    phase: str
    rows: int
    largest_group: int
    logit_rows: int

    @classmethod
    def of_batch(cls, batch: Batch) -> PlanKey:
        """The bucket of the step that runs ``batch``."""
        return cls.of(batch.phase, batch.group_rows, batch.num_logit_rows)

    @classmethod
    def of(cls, phase: str, group_rows: tuple[int, ...], logit_rows: int) -> PlanKey:
        """The bucket of a step with so many rows per group, ``logit_rows`` of which ask for logits."""
        return cls(phase, bucket(sum(group_rows)), bucket(max(group_rows)), bucket(logit_rows))


class PlanCache:
    """Plans of one deployment under one named layout, made when first needed and kept.

    ``context`` is the sequence length that attention is priced at.
    """

    def __init__(self, planner: Planner, layout: str, context: int) -> None:
        self.planner, self.layout, self.context = planner, layout, context
        self._plans: dict[PlanKey, Plan] = {}

    def plan_for(self, batch: Batch) -> Plan:
        """The plan for the step that runs ``batch``."""
        return self.plan_of(PlanKey.of_batch(batch))

    def plan_of(self, key: PlanKey) -> Plan:
        """The plan of a bucket, made now if it is not there; equal keys give the same object."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self.planner.plan(self.shape(key), self.layout)
        return plan

    def shape(self, key: PlanKey) -> StepShape:
        """The step a bucket is priced for: its largest group full, the rest of the rows spread over the others."""
        mesh = self.planner.deployment.mesh
        others = mesh.num_groups - 1
        rest = max(0, key.rows - key.largest_group)
        share, extra = divmod(rest, others) if others else (0, 0)
        group_rows = (key.largest_group, *(share + (i < extra) for i in range(others)))
        total = sum(group_rows)
        return StepShape.of(
            mesh, group_rows, phase=key.phase, context=self.context, logit_rows=min(key.logit_rows, total)
        )

    def items(self) -> tuple[tuple[PlanKey, Plan], ...]:
        """Every plan made so far, by key."""
        return tuple(sorted(self._plans.items(), key=lambda item: item[0]))


class FixedPlan:
    """One plan for every step, whatever its rows: a saved plan, or the one that keeps sums repeatable."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def plan_for(self, batch: Batch) -> Plan:
        """The plan."""
        return self.plan


def share_of_plan(plan: Plan, batch: Batch) -> float:
    """The share of a plan's predicted time that a batch should take."""
    rows = plan.shape.rows.total
    return min(batch.num_rows / rows, 1.0) if batch.phase == "prefill" and rows else 1.0
