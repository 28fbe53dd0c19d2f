"""Predictions for long contexts are the planner's own prices at those contexts."""

from __future__ import annotations

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost import device
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.cache import PlanCache
from narrows.plan.context_prices import ContextPrices, mean_context
from narrows.plan.planner import Deployment, Planner
from narrows.sched.batch import Batch, Chunk

LAYOUT, CONTEXT = "all-reduce", 1024


@pytest.fixture(scope="module")
def planner() -> Planner:
    deployment = Deployment(config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=8), device=device("h200"))
    return Planner(deployment, WeightSharding())


def batch_of(*chunks: tuple[int, int]) -> Batch:
    """Chunks as (first position, rows)."""
    made = [
        Chunk(request=n, start=start, tokens=(1,) * rows, pages=(1,), num_logits=1)
        for n, (start, rows) in enumerate(chunks)
    ]
    return Batch(groups=(tuple(made),))


@pytest.mark.parametrize("context", [2048, 8192, 65536])
@pytest.mark.parametrize("rows", [1, 16])
def test_decode_at_a_long_context_costs_what_a_plan_of_that_context_does(
    planner: Planner, rows: int, context: int
) -> None:
    batch = batch_of(*[(context - 1, 1)] * rows)
    plan = PlanCache(planner, LAYOUT, CONTEXT).plan_for(batch)
    shape = StepShape.of(planner.deployment.mesh, (rows,), phase="decode", context=context)
    expected = planner.plan(shape, LAYOUT).seconds
    assert expected > plan.seconds
    assert ContextPrices(planner).seconds(plan, batch) == pytest.approx(expected, rel=1e-9)


def test_contexts_up_to_that_of_the_plan_cost_what_the_plan_says(planner: Planner) -> None:
    batch = batch_of((3, 1), (900, 1))
    plan = PlanCache(planner, LAYOUT, CONTEXT).plan_for(batch)
    assert ContextPrices(planner).seconds(plan, batch) == plan.seconds


def test_a_chunk_late_in_a_long_prompt_costs_more_than_the_first(planner: Planner) -> None:
    prices, cache = ContextPrices(planner), PlanCache(planner, LAYOUT, CONTEXT)
    early, late = batch_of((0, 512)), batch_of((60_000, 512))
    plan = cache.plan_for(early)
    assert cache.plan_for(late) is plan
    assert prices.seconds(plan, late) > prices.seconds(plan, early) == plan.seconds


def test_the_mean_context_counts_rows_not_requests() -> None:
    assert mean_context(batch_of((0, 90), (989, 11))) == (90 * 90 + 11 * 1000) // 101
