"""Choices and regret of `narrows bench layout`: its numbers from made-up times of real plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.bench.grid import Cell, PlanTimes, grid_of, summary
from narrows.cost.devices import device
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts, shared_plans
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner

CONFIG, MESH = preset("dsv3-mini"), Mesh.of(dp=1, tp=2)
# Without the step that is an all-reduce and its norm, which no named layout has: so auto can be one of them.
DEVICE = replace(device("cpu-core"), fused_norm_bytes=0)
PLANNER = Planner(Deployment(config=CONFIG, mesh=MESH, device=DEVICE, graph=False), WeightSharding())
LAYOUTS = applicable_layouts(CONFIG, MESH)
SECONDS = st.floats(1e-4, 1e2)


def plans(rows: int, phase: str = "prefill") -> dict[str, Plan]:
    shape = StepShape.of(MESH, (rows,), phase=phase, context=max(rows, 2))
    return {name: PLANNER.plan(shape, name) for name in LAYOUTS}


FEW, MANY = plans(1, "decode"), plans(512)


def times(layouts: tuple[str, ...], plan: Plan, step_s: list[float]) -> PlanTimes:
    return PlanTimes(
        layouts=layouts,
        plan=plan,
        step_s=tuple(step_s),
        clocked_s=((1e-3,) * plan.num_ops,),
    )


def cell(steps: dict[tuple[str, ...], list[float]], of: dict[str, Plan] = MANY) -> Cell:
    found = tuple(times(names, of[names[0]], step_s) for names, step_s in steps.items())
    return Cell(title="a step", phase="prefill", rows=512, context=512, plans=found)


def test_plans_of_the_same_steps_are_measured_once() -> None:
    assert list(shared_plans(FEW)) == [("all-reduce", "auto"), ("attn-tp-input-scattered",), ("sequence-parallel",)]
    assert list(shared_plans(MANY)) == [(name,) for name in LAYOUTS]
    assert all(plan is FEW[names[0]] for names, plan in shared_plans(FEW).items())


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=9))
def test_regret_is_relative_to_the_best_plan_and_never_negative(rounds: list[tuple[float, float, float]]) -> None:
    a, b, auto = ([of[i] for of in rounds] for i in range(3))
    found = cell({("all-reduce",): a, ("sequence-parallel",): b, ("auto",): auto})
    assert found.regret >= 0 and found.named_regret >= 0
    assert (found.regret == 0) == (found.best is found.chosen)
    assert all(found.chosen_over(one).median - 1 <= found.regret for one in found.plans)
    low, high = found.regret_between
    assert low <= found.regret <= high
    assert found.is_right == (found.regret <= 0.03)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=9))
def test_a_plan_that_all_layouts_share_has_no_regret(rounds: list[tuple[float, float]]) -> None:
    shared = cell({("all-reduce", "auto"): [a for a, _ in rounds]})
    assert shared.regret == shared.named_regret == 0 and shared.best is shared.chosen
    named = cell({("all-reduce", "auto"): [a for a, _ in rounds], ("sequence-parallel",): [2 * a for a, _ in rounds]})
    assert named.regret == 0


@given(st.lists(st.tuples(SECONDS, SECONDS, st.floats(0.1, 10)), min_size=1, max_size=9))
def test_a_slow_round_is_no_regret(rounds: list[tuple[float, float, float]]) -> None:
    quiet = cell({("all-reduce",): [a for a, _, _ in rounds], ("auto",): [b for _, b, _ in rounds]})
    noisy = cell({("all-reduce",): [a * slow for a, _, slow in rounds], ("auto",): [b * slow for _, b, slow in rounds]})
    assert noisy.regret == pytest.approx(quiet.regret)


def test_choice_best_and_named_pick_by_hand() -> None:
    found = cell({("all-reduce",): [2.0, 2.0], ("sequence-parallel",): [1.0, 1.0], ("auto",): [1.1, 1.1]})
    assert (found.chosen.layouts, found.best.layouts) == (("auto",), ("sequence-parallel",))
    assert found.regret == pytest.approx(0.1) and not found.is_right
    cheapest = min(("all-reduce", "sequence-parallel"), key=lambda name: MANY[name].ps)
    assert found.named_pick == cheapest
    assert found.named_regret == pytest.approx({"all-reduce": 1.0, "sequence-parallel": 0.0}[cheapest])


def test_a_plan_within_three_percent_is_right() -> None:
    just, beyond = (cell({("all-reduce",): [1.0], ("auto",): [t]}) for t in (1.029, 1.031))
    found = summary([just, just, beyond, cell({("all-reduce", "auto"): [1.0]})])
    assert (found.cells, found.right, found.surely_wrong, found.share_right) == (4, 3, 1, 0.75)
    noisy = cell({("all-reduce",): [1.0] * 9, ("auto",): [1.0, 0.9] * 2 + [1.05] * 5})
    assert not noisy.is_right and summary([noisy]).surely_wrong == 0
    assert found.worst_regret == pytest.approx(0.031) and found.mean_regret == pytest.approx((0.029 * 2 + 0.031) / 4)


def test_errors_are_of_every_plan_without_their_signs() -> None:
    plan = MANY["auto"]
    found = summary([cell({("auto",): [2 * plan.seconds]}), cell({("auto",): [plan.seconds / 2]})])
    assert found.mean_error == pytest.approx((0.5 + 1.0) / 2)
    one = replace(
        times(("auto",), plan, [2 * plan.seconds]), clocked_s=((plan.seconds / plan.num_ops,) * plan.num_ops,)
    )
    assert one.execution_error == pytest.approx(0) and one.outside == pytest.approx(plan.seconds)


def test_seconds_of_classes_and_of_single_steps() -> None:
    plan = MANY["auto"]
    first = [float(i) for i in range(plan.num_ops)]
    one = replace(times(("auto",), plan, [1.0]), clocked_s=(tuple(first), tuple(2 * t for t in first)))
    by_class: dict[str, float] = {}
    for (_, op), seconds in zip(plan.ops(), first, strict=True):
        by_class[str(op.price_class)] = by_class.get(str(op.price_class), 0.0) + 1.5 * seconds
    assert one.classes == pytest.approx(by_class)
    at = 0
    for segment, of_steps in zip(plan.segments, one.segment_s, strict=True):
        num = len(segment.ops)
        for i, seconds in enumerate(of_steps):
            of_layers = [first[at + layer * num + i] for layer in range(segment.times)]
            assert seconds == pytest.approx(1.5 * sum(of_layers) / segment.times)
        at += segment.times * num
    assert at == plan.num_ops


def test_shares_of_price_sources_add_up() -> None:
    sources = times(("auto",), MANY["auto"], [1.0]).sources
    assert sum(sources.values()) == pytest.approx(1)
    assert set(sources) <= {source.label for source in Source}


def test_every_layout_is_in_every_series_and_the_document_is_whole() -> None:
    grid = grid_of([cell({(name,): [1.0, 2.0] for name in LAYOUTS}), cell({LAYOUTS: [1.0]})], ["a note"])
    assert [list(series.values) for series in grid.series] == [list(LAYOUTS), list(LAYOUTS)]
    document = grid.document()
    assert document["notes"] == ["a note"] and len(document["results"]) == len(document["cells"]) == 2
    assert document["summary"]["share_right"] == 1.0
    assert document["cells"][1]["plans"][0]["layouts"] == list(LAYOUTS)
    assert {"measured_us", "predicted_us", "source"} <= set(document["cells"][0]["plans"][0]["ops"][0])
