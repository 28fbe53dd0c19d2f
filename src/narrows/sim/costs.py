"""Prices a batch of the scheduler: its plan from the plan cache, at the rows and contexts of the batch.

The plan is chosen by the same bucket as at run time. Its price is then split: everything but the attention stages
depends on row counts alone and is kept by them; attention is priced per step, from the context of every chunk, in the
form in which chunks are computed (single rows as decode, longer ones as prefill, whatever the step is). Rows and
contexts are rounded to 1 part in 128 where they are large, so that few prices are computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from narrows.arch.stages import AttentionCore, PriceClass, RowSet, Stage
from narrows.cost.price import Source
from narrows.cost.pricer import OpPrice, Pricer, StepShape
from narrows.layout import Layout, RowSplit
from narrows.plan.cache import PlanCache, PlanKey
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.plan.reprice import Repricer
from narrows.sched.batch import Batch, Chunk

__all__ = ["CostsByPhase", "PlannedCosts", "StepCost", "StepCosts", "near"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Predicted seconds of one step, what they are for, and by which plan; ``plan`` None: by none, they were measured.

    ``parts``: seconds by (what for, source).
    """

    seconds: float
    parts: Mapping[tuple[str, str], float]
    plan: Plan | None = None


class StepCosts(Protocol):
    """Where a simulation's time comes from."""

    def cost(self, batch: Batch) -> StepCost:
        """What the ranks need for this batch."""
        ...


class CostsByPhase:
    """Other costs in each phase, such as those of an engine that has one layout for prompts and one for decoding."""

    def __init__(self, costs: Mapping[str, StepCosts]) -> None:
        self._costs = costs

    def cost(self, batch: Batch) -> StepCost:
        """What its phase's costs say."""
        return self._costs[batch.phase].cost(batch)


def near(n: int) -> int:
    """``n`` rounded to 1 part in 128 at most; below 128 as it is.

    >>> [near(n) for n in (0, 127, 129, 1001, 131072)]
    [0, 127, 130, 1000, 131072]
    """
    shift = max(0, n.bit_length() - 7)
    half = 1 << shift >> 1
    return (n + half) >> shift << shift


@dataclass(slots=True)
class _Group:
    """One attention group's part of a batch: rows, those with logits, and the (row, token) pairs that attend."""

    rows: int = 0
    logits: int = 0
    decode_rows: int = 0
    decode_pairs: int = 0
    prefill_rows: int = 0
    prefill_pairs: int = 0

    @classmethod
    def of(cls, chunks: tuple[Chunk, ...]) -> _Group:
        group = cls()
        for chunk in chunks:
            rows, start = len(chunk.tokens), chunk.start
            group.rows += rows
            group.logits += chunk.num_logits
            if rows == 1:
                group.decode_rows += 1
                group.decode_pairs += start + 1
            else:
                group.prefill_rows += rows
                group.prefill_pairs += rows * start + rows * (rows + 1) // 2
        return group


class _WithoutAttention(Pricer):
    """A pricer to which stages with an attention core cost nothing."""

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        if _attends(stage):
            return OpPrice(0, 0, 0, Source.MEASURED)
        return super().stage(stage, layout, fused, row_set)


def _attends(stage: Stage) -> bool:
    return any(isinstance(item, AttentionCore) for item in stage.work)


class _Planned:
    """One plan of the cache, ready to be priced: all but its attention stages by rows, and these apart."""

    def __init__(self, plan: Plan, repricer: Repricer) -> None:
        self.plan, self.repricer = plan, repricer
        self.attention: dict[tuple[Stage, Layout], int] = {}
        for segment in plan.segments:
            for op in segment.ops:
                if op.stage is not None and _attends(op.stage):
                    key = op.stage, op.layout
                    self.attention[key] = self.attention.get(key, 0) + segment.times
        self.rest_prices: dict[tuple[int, ...], tuple[int, dict[tuple[str, str], float]]] = {}
        self.attention_prices: dict[tuple[str, int, int], tuple[int, Source]] = {}


class PlannedCosts:
    """Costs by one deployment's plans under one named layout.

    ``context``: what the plan cache's plans are made for. ``overhead_s``: what a step takes besides, seconds
    that neither its plan nor its device's measurements hold.
    """

    def __init__(self, planner: Planner, layout: str, context: int, *, overhead_s: float = 0.0) -> None:
        self._planner, self._layout, self._overhead_s = planner, layout, overhead_s
        self.plans = PlanCache(planner, layout, context)
        self._planned: dict[int, _Planned] = {}

    def cost(self, batch: Batch) -> StepCost:
        """The seconds of the batch's plan, and the overhead."""
        groups = [_Group.of(chunks) for chunks in batch.groups]
        rows, num_logits = tuple(group.rows for group in groups), sum(group.logits for group in groups)
        plan = self.plans.plan_of(PlanKey.of(batch.phase, rows, num_logits))
        planned = self._planned.get(id(plan))
        if planned is None:
            planned = self._planned[id(plan)] = _Planned(plan, Repricer(plan, self._planner.graph(plan.layout_name)))
        rest_ps, rest = self._rest(planned, groups)
        attention_ps, source = max(self._attention(planned, group) for group in groups)
        parts = dict(rest)
        if attention_ps:
            core = PriceClass.ATTENTION.value, source.label
            parts[core] = parts.get(core, 0.0) + attention_ps * 1e-12
        if self._overhead_s:
            parts["host", "overhead"] = self._overhead_s
        return StepCost(seconds=(rest_ps + attention_ps) * 1e-12 + self._overhead_s, parts=parts, plan=plan)

    def _rest(self, planned: _Planned, groups: list[_Group]) -> tuple[int, dict[tuple[str, str], float]]:
        """Everything but the attention stages: picoseconds, and their parts in seconds."""
        rows, logits = [near(group.rows) for group in groups], [near(group.logits) for group in groups]
        largest = rows.index(max(rows))
        key = rows[largest], near(sum(rows)), max(logits), near(sum(logits))
        found = planned.rest_prices.get(key)
        if found is None:
            mesh, plan = self._planner.deployment.mesh, planned.plan
            shape = StepShape(
                rows=RowSplit.from_groups(mesh, _spread(key[0], key[1], len(groups))),
                logits=RowSplit.from_groups(mesh, _spread(key[2], key[3], len(groups))),
                phase=plan.shape.phase,
                context=plan.shape.context,
            )
            prices = self._prices(shape, _WithoutAttention)
            host = prices.step()
            priced = {**planned.repricer.at(prices), (PriceClass.HOST, host.source): host.ps}
            parts = {(kind.value, source.label): ps * 1e-12 for (kind, source), ps in priced.items() if ps}
            found = planned.rest_prices[key] = sum(priced.values()), parts
        return found

    def _prices(self, shape: StepShape, kind: type[Pricer]) -> Pricer:
        return self._planner.deployment.pricer(shape, kind)

    def _attention(self, planned: _Planned, group: _Group) -> tuple[int, Source]:
        """The attention stages of one group: picoseconds, and how well they are known."""
        if not group.rows:
            return 0, Source.MEASURED
        decode = group.decode_rows
        context = round(group.decode_pairs / decode) if decode else 1
        if not group.prefill_rows:
            return self._stages(planned, "decode", decode, context)
        # The context at which a prefill step of so many rows has as many pairs (see StepShape).
        attended = group.prefill_pairs / group.rows
        whole = 2 * attended <= group.rows
        ps, source = self._stages(
            planned, "prefill", group.rows, round(2 * attended if whole else attended + group.rows / 2)
        )
        if decode:  # what their contexts cost; that they are rows has been counted
            more, known = self._stages(planned, "decode", decode, context)
            less, _ = self._stages(planned, "decode", decode, 1)
            ps, source = ps + max(0, more - less), max(source, known)
        return ps, source

    def _stages(self, planned: _Planned, phase: str, rows: int, context: int) -> tuple[int, Source]:
        key = phase, near(rows), max(1, near(context))
        found = planned.attention_prices.get(key)
        if found is None:
            mesh = self._planner.deployment.mesh
            split = RowSplit.from_groups(mesh, (key[1], *(0,) * (mesh.num_groups - 1)))
            prices = self._prices(StepShape(rows=split, logits=split, phase=phase, context=key[2]), Pricer)
            ps, source = 0, Source.MEASURED
            for (stage, layout), times in planned.attention.items():
                price = prices.stage(stage, layout, False, RowSet.ALL)
                ps, source = ps + times * price.ps, max(source, price.source)
            found = planned.attention_prices[key] = ps, source
        return found


def _spread(largest: int, total: int, num_groups: int) -> tuple[int, ...]:
    """``total`` rows of which one group has ``largest`` and the others the rest, as evenly as can be."""
    if num_groups == 1:
        return (largest,)
    rest = min(max(total - largest, 0), largest * (num_groups - 1))
    share, extra = divmod(rest, num_groups - 1)
    return (largest, *(share + (i < extra) for i in range(num_groups - 1)))
