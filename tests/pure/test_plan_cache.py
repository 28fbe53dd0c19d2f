"""The plan cache: buckets, keys, and plans that are made once and run any step of their bucket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.layout import Mesh
from narrows.plan.cache import PlanCache, PlanKey, bucket
from narrows.plan.planner import Deployment, Planner


def cache(mesh: Mesh, layout: str = "auto") -> PlanCache:
    deployment = Deployment(config=preset("deepseek-v2-lite"), mesh=mesh, device=device("h100"))
    return PlanCache(Planner(deployment, WeightSharding()), layout, context=1024)


@given(st.integers(0, 2**20), st.integers(0, 2**20))
def test_buckets_cover_their_rows_and_waste_less_than_half(a: int, b: int) -> None:
    assert a <= bucket(a) <= max(a, 1.5 * a)
    assert bucket(bucket(a)) == bucket(a)
    assert bucket(min(a, b)) <= bucket(max(a, b))


def test_equal_keys_give_the_same_plan_object() -> None:
    plans = cache(Mesh.of(dp=2, tp=2))
    first = plans.plan_of(PlanKey.of("prefill", (1000, 900), 2))
    assert plans.plan_of(PlanKey.of("prefill", (1020, 1000), 2)) is first
    assert plans.plan_of(PlanKey.of("prefill", (900, 1000), 2)) is first  # which group is the largest does not matter
    assert plans.plan_of(PlanKey.of("decode", (1000, 900), 2)) is not first
    assert plans.plan_of(PlanKey.of("prefill", (1000, 900), 9)) is not first
    assert len(plans.items()) == 3
    for _, plan in plans.items():
        plan.validate()


@pytest.mark.parametrize(
    ("group_rows", "logit_rows"), [((5, 0), 1), ((0, 0), 0), ((1, 0), 0), ((300, 300), 600), ((1, 1023), 3)]
)
def test_uneven_and_empty_steps_have_plans(group_rows: tuple[int, int], logit_rows: int) -> None:
    plans = cache(Mesh.of(dp=2, tp=2))
    plan = plans.plan_of(PlanKey.of("prefill", group_rows, logit_rows))
    plan.validate()
    assert plan.shape.rows.total >= sum(group_rows)
    assert max(plan.shape.group_rows) >= max(group_rows)
    assert plan.shape.logits.total >= logit_rows


@given(st.lists(st.integers(0, 5000), min_size=3, max_size=3), st.data())
def test_a_bucket_is_priced_at_its_upper_end(group_rows: list[int], data: st.DataObject) -> None:
    mesh = Mesh.of(dp=3, tp=2)
    logit_rows = data.draw(st.integers(0, sum(group_rows)))
    key = PlanKey.of("prefill", tuple(group_rows), logit_rows)
    shape = PlanCache.shape(cache(mesh), key)
    assert shape.rows.total >= sum(group_rows) and max(shape.group_rows) >= max(group_rows)
    assert shape.rows.total == max(key.rows, key.largest_group)
    assert shape.logits.total >= logit_rows


def test_a_cache_keeps_to_its_layout() -> None:
    plan = cache(Mesh.of(dp=1, tp=2), "sequence-parallel").plan_of(PlanKey.of("prefill", (512,), 1))
    assert plan.layout_name == "sequence-parallel"
