"""Explanations: totals that add up, reasons that are in the steps, and the row counts at which the best changes."""

from __future__ import annotations

import doctest
import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.arch.stages import PriceClass
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh, split_evenly
from narrows.plan import cache
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner, choose_sharding, known_sharding
from narrows.plan.report import crossovers, explain
from narrows.plan.report.crossovers import RowRange, Sweep, row_ranges, spread
from narrows.plan.report.explain import compare, describe, main_segment, segment_difference, why
from narrows.plan.report.plan_report import make_report

TP8, DP2 = Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4)


def planner(mesh: Mesh, on: str = "h20", model: str = "deepseek-v3", sharding: WeightSharding | None = None) -> Planner:
    hardware = device(on)
    dtype = "fp8" if hardware.tflops_fp8 else "bf16"
    deployment = Deployment(config=preset(model), mesh=mesh, device=hardware, dtype=dtype)
    return Planner(deployment, sharding or WeightSharding())


def step_of(mesh: Mesh, rows: int, phase: str = "prefill") -> StepShape:
    return StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase=phase, context=4096)


@pytest.mark.parametrize("module", [cache, crossovers, explain], ids=lambda module: module.__name__)
def test_doctests(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed


# -- side by side ------------------------------------------------------------------------------------------------------


def test_compare_puts_totals_side_by_side() -> None:
    plans = [planner(DP2).plan(step_of(DP2, 8192), name) for name in applicable_layouts(preset("deepseek-v3"), DP2)]
    side_by_side = compare(plans)
    assert side_by_side.names == tuple(plan.layout_name for plan in plans)
    assert list(side_by_side.seconds) == list(PriceClass)
    for i, plan in enumerate(plans):
        assert sum(seconds[i] for seconds in side_by_side.seconds.values()) == pytest.approx(side_by_side.totals[i])
        assert side_by_side.ratios[i] == plan.ps / min(other.ps for other in plans)
    assert min(side_by_side.ratios) == side_by_side.ratios[-1] == 1.0  # auto


# -- why ---------------------------------------------------------------------------------------------------------------


def test_the_reason_names_the_ops_that_differ() -> None:
    plans = planner(TP8)
    auto, other = (plans.plan(step_of(TP8, 32768), name) for name in ("auto", "attn-tp-input-scattered"))
    text = why(auto, other)
    percent = 100 * (other.ps / auto.ps - 1)
    assert text.startswith(
        f"attn-tp-input-scattered costs {percent:.1f} % more (+{(other.ps - auto.ps) / 1e9:.1f} ms): "
    )
    router = other.totals()[PriceClass.ROUTER] - auto.totals()[PriceClass.ROUTER]
    assert (
        f"router at FULL (32768 rows of the largest rank) instead of SCATTERED (4096) (+{1e3 * router:.1f} ms)" in text
    )
    assert "all-reduce instead of reduce-scatter + all-gather into experts" in text
    saved = other.totals()[PriceClass.COMMUNICATION] - auto.totals()[PriceClass.COMMUNICATION]
    assert f"communication {1e3 * saved:.1f} ms" in text
    assert "qkv_a_proj" not in text  # both run it on scattered rows


def test_the_reason_names_each_of_several_axes() -> None:
    plans = planner(DP2, "h100")
    auto, other = (plans.plan(step_of(DP2, 16384), name) for name in ("auto", "norm-before-gather"))
    text = why(auto, other).replace(" of the largest rank", "")
    assert "all-reduce over tp + all-gather over dp instead of reduce-scatter over tp + all-gather over dp x tp" in text
    assert "input_norm at GROUP (8192 rows) instead of SCATTERED (2048)" in text


@pytest.mark.slow
def test_every_difference_has_a_cause() -> None:
    """The causes that `why` picks from add up, per class, to the difference of the totals."""
    for mesh, rows in itertools.product((TP8, DP2, Mesh.of(dp=8, tp=1)), (4, 1023, 16384)):
        plans = planner(mesh)
        auto = plans.plan(step_of(mesh, rows))
        for name in applicable_layouts(preset("deepseek-v3"), mesh):
            other = plans.plan(step_of(mesh, rows), name)
            causes = explain._causes(auto, other)
            for price_class in PriceClass:
                found = sum(causes.get(price_class, {}).values()) * 1e-12
                assert found == pytest.approx(other.totals()[price_class] - auto.totals()[price_class], abs=1e-12)


def test_why_of_an_equal_plan() -> None:
    plans = planner(TP8)
    auto = plans.plan(step_of(TP8, 8))
    assert why(auto, replace(auto, layout_name="all-reduce")) == "auto is all-reduce: the same ops at the same cost"
    one = Mesh.of(dp=1, tp=1)
    small = planner(one, model="llama-3.1-8b")
    both = [small.plan(step_of(one, 4, "decode"), name) for name in ("auto", "all-reduce")]
    assert both[0].ps == both[1].ps
    assert why(*both) in (
        "auto is all-reduce: the same ops at the same cost",
        "all-reduce costs the same as auto, by other ops",
    )


def test_the_reason_for_another_sharding_and_for_a_cheaper_plan() -> None:
    shape = step_of(TP8, 4096)
    published, column = planner(TP8), planner(TP8, sharding=WeightSharding(qkv_a_proj="column"))
    better, worse = published.plan(shape), column.plan(shape)
    assert better.ps < worse.ps
    assert re.match(r"auto costs [\d.]+ % less \(-", why(worse, better))
    assert "% more (+" in why(better, worse)
    whole = planner(TP8, sharding=WeightSharding(experts="whole")).plan(shape)
    assert "experts on equal rows, its weights sharded otherwise" in why(better, whole).replace(
        " of the largest rank", ""
    )


def test_no_layout_has_a_text_of_its_own() -> None:
    """The words come from the steps: the same plan under another name is explained with the same words."""
    plans = planner(DP2)
    auto, other = plans.plan(step_of(DP2, 4096)), plans.plan(step_of(DP2, 4096), "sequence-parallel")
    renamed = replace(other, layout_name="X")
    assert why(auto, renamed) == why(auto, other).replace("sequence-parallel", "X")


def test_a_plan_in_words() -> None:
    plans = planner(TP8)

    def words(name: str, rows: int = 32768) -> str:
        return describe(plans.plan(step_of(TP8, rows), name))

    assert words("all-reduce") == "all-reduce into attention; all-reduce into experts"
    narrow = "reduce-scatter + all-gather of qkv_latent into attention"
    assert words("attn-tp-input-scattered") == f"{narrow}; all-reduce into experts"
    assert words("auto") == f"{narrow}; reduce-scatter + all-gather into experts"
    assert describe(planner(Mesh.of(dp=1, tp=1)).plan(step_of(Mesh.of(dp=1, tp=1), 9))) == (
        "no move into attention; no move into experts"
    )


def test_a_differing_layer_is_described_in_one_line() -> None:
    plan = planner(TP8).plan(step_of(TP8, 32768), "attn-tp-input-scattered")
    first = next(segment for segment in plan.segments if segment.layers == (0,))
    usual = next(segment for segment in plan.segments if segment.layers == (1, 2))
    assert segment_difference(plan, usual, usual) == ""
    assert segment_difference(plan, usual, first) == (
        "without slice of residual to SCATTERED; without input_norm of hidden, residual at SCATTERED; "
        "with input_norm of hidden at SCATTERED"
    )
    assert main_segment(plan).layers == tuple(range(3, 61))


# -- crossovers --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 15), unique=True), st.lists(st.floats(0, 0.9), min_size=15, max_size=15))
def test_changes_a_factor_of_two_apart_are_found_to_the_row(powers: list[int], parts: list[float]) -> None:
    changes = [(1 << p) + 1 + int(parts[p - 1] * ((1 << p) - 1)) for p in sorted(powers)[::2]]

    def best_at(rows: int) -> str:
        return str(sum(rows >= change for change in changes))

    found = row_ranges(best_at, 65536)
    assert [each.first for each in found] == [1, *changes]
    assert [each.last for each in found] == [*(change - 1 for change in changes), 65536]
    assert [each.best for each in found] == [best_at(each.first) for each in found]


def test_a_crossover_that_flickers_is_printed_once() -> None:
    def best_at(rows: int) -> str:
        return "few" if rows < 1000 or (rows < 1040 and rows % 8) else "many"

    found = row_ranges(best_at, 4096)
    assert [each.best for each in found] == ["few", "many"]
    assert 1000 <= found[1].first <= 1040
    assert row_ranges(best_at, 1) == (RowRange(first=1, last=1, best="few"),)


@given(st.integers(0, 10**5), st.lists(st.integers(0, 5000), min_size=1, max_size=8).filter(any))
def test_spread_keeps_proportions(rows: int, like: list[int]) -> None:
    groups = spread(rows, tuple(like))
    assert sum(groups) == rows and min(groups) >= 0
    if tuple(like) != split_evenly(sum(like), len(like)):  # an even split stays even, larger groups first
        assert all(abs(n - rows * share / sum(like)) < 1 for n, share in zip(groups, like, strict=True))
    assert spread(sum(like), tuple(like)) == tuple(like)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "on"), [(TP8, "h20"), (DP2, "b200")], ids=str)
def test_ranges_agree_with_plans_at_their_ends(mesh: Mesh, on: str) -> None:
    plans = planner(mesh, on)
    names = applicable_layouts(preset("deepseek-v3"), mesh)[:-1]
    sweep = Sweep(shape=step_of(mesh, 1024), top=65536)
    named = sweep.named(plans, names)
    assert len(named) > 1
    for found in named:
        for rows in (found.first, (found.first + found.last) // 2, found.last):
            costs = {name: plans.plan(sweep.at(rows), name).ps for name in names}
            assert costs[found.best] <= 1.01 * min(costs.values())  # where it flickers, within a percent
    auto = sweep.auto(plans)
    assert len(auto) > 1
    for found in auto:
        assert describe(plans.plan(sweep.at(found.first))) == found.best
    assert auto[0].best.startswith("all-reduce") and auto[-1].best.count("reduce-scatter") == 2


def test_crossovers_of_the_published_machine_match_the_table() -> None:
    """All-reduce at few rows, the narrow gather from some hundred rows on: H100's collectives, dp 1 x tp 8."""
    sweep = Sweep(shape=step_of(TP8, 1024), top=65536)
    found = sweep.named(planner(TP8, "h100"), ("all-reduce", "attn-tp-input-scattered", "sequence-parallel"))
    assert [each.best for each in found] == ["all-reduce", "attn-tp-input-scattered"]
    assert 128 < found[1].first < 1024
    wide = sweep.named(planner(TP8, "h100"), ("all-reduce",))
    assert wide == (RowRange(first=1, last=65536, best="all-reduce"),)
    with pytest.raises(ConfigError, match="at least one layout"):
        sweep.named(planner(TP8), ())


def test_a_sweep_keeps_groups_phase_and_logit_rows() -> None:
    shape = StepShape.of(DP2, (300, 100), phase="decode", context=77)
    sweep = Sweep(shape=shape, top=1000)
    assert sweep.at(400) == shape
    assert sweep.at(40).group_rows == (30, 10) and sweep.at(40).context == 77
    assert sweep.at(40).logits.total == 40
    assert Sweep(shape=shape, top=1000, logit_rows=16).at(40).logits.total == 16
    assert Sweep(shape=shape, top=1000, logit_rows=16).at(7).logits.total == 7


# -- weight sharding and the whole report ------------------------------------------------------------------------------


@pytest.mark.slow
def test_sharding_is_the_cheapest_that_leaves_room_for_the_step() -> None:
    deployment = planner(TP8, "h200").deployment
    shape = step_of(TP8, 16384)
    chosen = choose_sharding(deployment, [(shape, 1.0)])
    assert Planner(deployment, chosen).plan(shape).ps <= Planner(deployment, WeightSharding()).plan(shape).ps
    assert deployment.memory(chosen).holds(shape.kv_tokens)
    tight = planner(TP8, "h20").deployment
    large = step_of(TP8, 45000)
    assert tight.memory(choose_sharding(tight, [(large, 1.0)])).holds(large.kv_tokens)
    assert (
        choose_sharding(planner(TP8, "h100").deployment, [(shape, 1.0)]) == WeightSharding()
    )  # nothing fits: the published ones


@pytest.mark.slow
def test_sharding_leaves_room_for_the_steps_activations() -> None:
    """The cheapest set's weights and KV cache fit, half of the step's activations do not."""
    deployment, shape = planner(TP8, "h200").deployment, step_of(TP8, 4096)
    dear = choose_sharding(deployment, [(shape, 1.0)])
    use = Planner(deployment, dear).memory(Planner(deployment, dear).plan(shape))
    room = use.weights + use.process + shape.kv_tokens * use.kv_per_token + use.workspace // 2
    tight = replace(deployment, device=replace(deployment.device, memory_bytes=float(room)))
    assert tight.memory(dear).holds(shape.kv_tokens)
    by = Planner(tight, choose_sharding(tight, [(shape, 1.0)]))
    assert by.sharding != dear and by.memory(by.plan(shape)).holds(shape.kv_tokens)


def test_sharding_is_searched_once_for_equal_deployments_and_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, shape = planner(TP8, "h200").deployment, step_of(TP8, 77)
    chosen = known_sharding(deployment, ((shape, 1.0),))
    assert chosen == choose_sharding(deployment, [(shape, 1.0)])
    searched: list[Deployment] = []

    def search(deployment: Deployment, _mix: object) -> WeightSharding:
        searched.append(deployment)
        return WeightSharding()

    monkeypatch.setattr("narrows.plan.planner.choose_sharding", search)
    assert known_sharding(replace(deployment), ((step_of(TP8, 77), 1.0),)) == chosen and searched == []
    other = replace(deployment, expert_skew=0.125)
    assert known_sharding(other, ((shape, 1.0),)) == WeightSharding() and searched == [other]


def test_kv_tokens_of_a_step() -> None:
    assert StepShape.of(DP2, (300, 5000), phase="prefill", context=4096).kv_tokens == 5000
    assert StepShape.of(DP2, (300, 100), phase="prefill", context=4096).kv_tokens == 4096
    assert StepShape.of(DP2, (3, 4), phase="decode", context=4096).kv_tokens == 4 * 4096
    assert StepShape.of(DP2, (0, 0), phase="prefill", context=4096).kv_tokens == 0


def test_logit_rows_by_default_are_one_per_sequence_of_each_group() -> None:
    shape = StepShape.of(DP2, (1, 9000), phase="prefill", context=4096)
    assert shape.logits.counts == (1, 0, 0, 0, 1, 1, 1, 0)
    assert StepShape.of(DP2, (0, 9), phase="decode", context=4096).logits.total == 9
    assert StepShape.of(DP2, (6, 3), phase="prefill", context=4, logit_rows=3).logits.counts == (1, 1, 0, 0, 1, 0, 0, 0)


@pytest.mark.slow
def test_a_report_in_python() -> None:
    deployment = planner(TP8, "h200").deployment
    report = make_report(deployment, step_of(TP8, 4096))
    names = [entry.plan.layout_name for entry in report.entries]
    assert names == list(applicable_layouts(deployment.config, TP8))
    assert report.entries[-1] is report.auto
    assert list(report.inapplicable) == ["norm-before-gather"]
    plans: list[Plan] = [entry.plan for entry in report.entries]
    assert len(report.why) == len(plans) - 1 + (report.auto.sharding != WeightSharding())
    if report.auto.sharding != WeightSharding():
        assert report.why[-1].startswith("auto with the published sharding costs ")
