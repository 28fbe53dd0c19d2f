"""Price of a simulated step: a plan's own price at its own shape, and more with every row and token of context."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.measured import Measured, StepTable
from narrows.cost.pricer import Pricer
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.plan.cache import PlanCache, PlanKey
from narrows.plan.deploy import step_mix
from narrows.plan.named import applicable_layouts, named_layout
from narrows.plan.planner import Deployment, Planner, choose_sharding
from narrows.plan.reprice import Repricer
from narrows.sched.batch import Batch, Chunk
from narrows.sim.costs import PlannedCosts, near
from narrows.sim.measured import read_step_times

CONTEXT = 1024


def planner(model: str, dp: int, tp: int, layout: str = "auto", encode_rows: str = "none") -> Planner:
    mesh = Mesh.of(dp=dp, tp=tp)
    deployment = Deployment(config=preset(model), mesh=mesh, device=device("h200"), encode_rows=encode_rows)
    sharding = named_layout(layout, deployment.config, mesh).sharding or choose_sharding(
        deployment, step_mix(mesh, 2048, CONTEXT)
    )
    return Planner(deployment, sharding)


def batch(*groups: list[tuple[int, int]]) -> Batch:
    """A step whose chunks are (start, rows); each samples its last row."""
    return Batch(
        groups=tuple(
            tuple(
                Chunk(request=100 * g + i, start=start, tokens=(0,) * rows, pages=(), num_logits=1)
                for i, (start, rows) in enumerate(chunks)
            )
            for g, chunks in enumerate(groups)
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("encode_rows", ["none", "int8-always"])
@pytest.mark.parametrize(("model", "dp", "tp"), [("deepseek-v3", 2, 4), ("dsv2-mini", 1, 2), ("qwen3-30b-a3b", 4, 1)])
def test_a_plan_repriced_at_its_own_shape_keeps_its_price(model: str, dp: int, tp: int, encode_rows: str) -> None:
    for layout in applicable_layouts(preset(model), Mesh.of(dp=dp, tp=tp)):
        by = planner(model, dp, tp, layout, encode_rows)
        cache = PlanCache(by, layout, CONTEXT)
        for phase, rows in (("prefill", 1500), ("prefill", 3), ("decode", 7), ("decode", 200)):
            plan = cache.plan_of(PlanKey.of(phase, (rows,) * dp, rows * dp if phase == "decode" else 2))
            d = by.deployment
            prices = Pricer(d.device, d.mesh, plan.shape, d.dtype, itemsize=d.itemsize, graph=d.graph)
            priced = Repricer(plan, by.graph(layout)).at(prices)
            assert sum(priced.values()) == plan.ps
            for price_class, seconds in plan.totals().items():
                of_class = sum(ps for (kind, _), ps in priced.items() if kind is price_class)
                assert of_class * 1e-12 == pytest.approx(seconds)


@pytest.mark.parametrize(("model", "dp", "tp"), [("deepseek-v3", 2, 4), ("dsv3-mini", 1, 2), ("llama-3.1-8b", 2, 1)])
def test_a_step_that_fills_its_bucket_costs_its_plans_price(model: str, dp: int, tp: int) -> None:
    by = planner(model, dp, tp)
    costs = PlannedCosts(by, "auto", CONTEXT)
    decode = costs.cost(batch(*[[(CONTEXT - 1, 1)] * 48] * dp))
    prefill = costs.cost(batch(*[[(0, CONTEXT)] * 2] * dp))
    for found in (decode, prefill):
        assert found.plan is not None
        assert found.seconds == pytest.approx(found.plan.seconds, rel=1e-9)
        assert sum(found.parts.values()) == pytest.approx(found.seconds)
        by_class = {kind: seconds for kind, seconds in found.plan.totals().items() if seconds}
        assert {kind for kind, _ in found.parts} == {kind.value for kind in by_class}
    with_overhead = PlannedCosts(by, "auto", CONTEXT, overhead_s=1e-3).cost(batch(*[[(CONTEXT - 1, 1)] * 48] * dp))
    assert with_overhead.seconds == pytest.approx(decode.seconds + 1e-3)


def test_time_between_steps_is_part_of_every_step() -> None:
    steps = [StepTable(phase=phase, points=[[1, 1000], [64, 2000], [4096, 9000]]) for phase in ("decode", "prefill")]
    machine = replace(device("cpu-core"), name="here", measured=Measured(steps=steps))
    deployment = Deployment(config=preset("dsv3-mini"), mesh=Mesh.of(dp=1, tp=2), device=machine)
    found = PlannedCosts(Planner(deployment, WeightSharding()), "auto", CONTEXT).cost(batch([(CONTEXT - 1, 1)] * 64))
    assert found.plan is not None and found.seconds == pytest.approx(found.plan.seconds, rel=1e-9)
    assert found.parts["host", "measured"] == pytest.approx(2e-3)


def test_a_chunk_attends_to_the_tokens_before_it() -> None:
    context = 1 << 15
    by = planner("deepseek-v3", 1, 8)
    found = PlannedCosts(by, "auto", context).cost(batch([(context - 1024, 1024)]))
    assert found.plan is not None
    assert found.seconds == pytest.approx(found.plan.seconds, rel=1e-9)  # planned for the last rows of one long text


def test_rows_contexts_and_the_fullest_group_decide() -> None:
    costs = PlannedCosts(planner("deepseek-v3", 2, 4), "auto", CONTEXT)

    def seconds(*groups: list[tuple[int, int]]) -> float:
        return costs.cost(batch(*groups)).seconds

    short, long = [(500, 1)] * 40, [(60000, 1)] * 40
    assert seconds(long, long) > 1.5 * seconds(short, short)
    # Groups wait for each other, so the longer contexts of one decide.
    assert seconds(long, short) == pytest.approx(seconds(long, long))
    assert seconds(short, [(500, 1)] * 41) >= seconds(short, short)
    # Chunks of a prompt attend to the tokens before them.
    assert seconds([(30000, 1000)], []) > seconds([(0, 1000)], [])
    # Rows of texts beside a prompt's read their contexts, whatever the prompt's are.
    mixed, prompt = seconds([*long, (0, 960)], []), seconds([*short, (0, 960)], [])
    assert mixed - prompt == pytest.approx(seconds(long, []) - seconds(short, []), rel=0.05)


def test_a_step_within_a_bucket_costs_less_than_its_upper_end() -> None:
    costs = PlannedCosts(planner("dsv3-mini", 1, 2), "auto", CONTEXT)
    nine, twelve = (costs.cost(batch([(CONTEXT - 1, 1)] * rows)) for rows in (9, 12))
    assert nine.plan is twelve.plan and nine.seconds < twelve.seconds


@given(st.integers(0, 1 << 40))
def test_rounding_is_small_and_settles(n: int) -> None:
    assert abs(near(n) - n) <= n / 128
    assert near(near(n)) == near(n)


def test_measured_steps_replace_prices(tmp_path: Path) -> None:
    file = tmp_path / "steps"
    steps = [("decode", 1, 0.1), ("decode", 1, 0.3), ("decode", 8, 0.9), ("prefill", 100, 2.0)]
    file.write_text("\n".join(json.dumps({"phase": p, "rows": r, "seconds": s}) for p, r, s in steps))
    costs = read_step_times(file)

    def seconds(chunks: list[tuple[int, int]]) -> float:
        return costs.cost(batch(chunks)).seconds

    assert seconds([(5, 1)]) == pytest.approx(0.2) and seconds([(5, 1)] * 8) == pytest.approx(0.9)
    assert seconds([(5, 1)] * 4) == pytest.approx(0.2 + 0.7 * 3 / 7)
    assert seconds([(5, 1)] * 16) == pytest.approx(1.8)
    assert seconds([(0, 50)]) == pytest.approx(2.0) and seconds([(0, 300)]) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 of --step-times"),
        ('{"phase": "warm", "rows": 1, "seconds": 1}', "line 1"),
        ('{"phase": "decode", "rows": 1, "seconds": 1}\n[]', "line 2"),
        ('{"phase": "decode", "rows": 1}', "line 1.*there is no seconds"),
        ('{"phase": "decode", "rows": 0, "seconds": 1}', "line 1.*a step of 0 rows and 1.0 seconds"),
        ('{"phase": "decode", "rows": 1, "seconds": NaN}', "line 1.*nan seconds"),
        ('{"phase": "decode", "rows": 1, "seconds": -1}', "line 1.*-1.0 seconds"),
        ('{"phase": "decode", "rows": 1, "seconds": 1}', "has no prefill step"),
    ],
)
def test_unreadable_step_files_are_errors_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "steps").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_step_times(tmp_path / "steps")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_step_times(tmp_path / "none")
