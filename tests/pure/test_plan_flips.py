"""At which error of a price the choice flips: by brute force it is there, and not before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrows.arch.presets import preset
from narrows.arch.stages import RowSet
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.pricer import OpPrice, Pricer, StepShape
from narrows.layout import Mesh, Move, MoveKind
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner
from narrows.plan.report.explain import describe
from narrows.plan.report.flips import LARGEST_FACTOR, Flip, flips
from narrows.plan.search import Search


class Scaled(Pricer):
    """Prices in which one kind of collective over some axes costs ``factor`` times as much."""

    kind, axes, factor = "", "", 1.0

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        price = super().move(move, row_bytes, row_set)
        if f"{move.kind.value.replace('_', '-')} over {move.axes}" != f"{self.kind} over {self.axes}":
            return price
        return OpPrice(round(price.ps * self.factor), price.rows, price.nbytes, price.source)


def step(model: str, name: str, dp: int, tp: int, rows: int) -> tuple[Planner, StepShape]:
    mesh = Mesh.of(dp=dp, tp=tp)
    deployment = Deployment(config=preset(model), mesh=mesh, device=device(name), dtype="fp8")
    return Planner(deployment, WeightSharding()), StepShape.of(mesh, (rows // dp,) * dp, phase="prefill", context=4096)


def words_at(planner: Planner, shape: StepShape, plan: Plan, flip: Flip, factor: float) -> str:
    kind, _, axes = flip.group.partition(" over ")
    prices = planner.deployment.pricer(shape, type("At", (Scaled,), {"kind": kind, "axes": axes, "factor": factor}))
    return describe(replace(plan, segments=Search(planner.graph("auto"), prices).solve()))


@pytest.mark.parametrize(
    ("model", "name", "dp", "tp", "rows"),
    [
        ("deepseek-v3", "h20", 1, 8, 32768),
        ("deepseek-v3", "h200", 1, 8, 1024),
        ("qwen3-30b-a3b", "h100", 2, 2, 4096),
    ],
)
def test_the_choice_flips_there_and_not_before(model: str, name: str, dp: int, tp: int, rows: int) -> None:
    planner, shape = step(model, name, dp, tp, rows)
    plan = planner.plan(shape)
    found = flips(planner, plan)
    assert found
    assert [max(flip.factor, 1 / flip.factor) for flip in found] == sorted(
        max(flip.factor, 1 / flip.factor) for flip in found
    )
    kinds = {kind.value.replace("_", "-") for kind in MoveKind}
    tried = [flip for flip in found if flip.group.partition(" over ")[0] in kinds]
    assert tried
    for flip in tried:
        assert 1 / LARGEST_FACTOR <= flip.factor <= LARGEST_FACTOR and flip.factor != 1 and flip.cost > 0
        before = flip.factor / 1.02 if flip.factor > 1 else flip.factor * 1.02
        assert words_at(planner, shape, plan, flip, flip.factor) == flip.words != describe(plan)
        if max(flip.factor, 1 / flip.factor) > 1.02:
            assert words_at(planner, shape, plan, flip, before) == describe(plan)


def test_a_choice_is_called_by_its_named_layout() -> None:
    planner, shape = step("deepseek-v3", "h20", 1, 8, 32768)
    plan = planner.plan(shape)
    names = [name for name in applicable_layouts(planner.deployment.config, planner.deployment.mesh) if name != "auto"]
    found = flips(planner, plan, [planner.plan(shape, name) for name in names])
    cheap = next(flip for flip in found if flip.group == "all-reduce over tp" and flip.factor < 1)
    assert cheap.layout == "attn-tp-input-scattered"
    assert str(cheap) == f"all-reduce over tp cost {100 * (1 - cheap.factor):.0f} % less: then attn-tp-input-scattered"


def test_nothing_flips_where_there_is_one_rank() -> None:
    planner, shape = step("llama-3.1-8b", "h100", 1, 1, 512)
    assert flips(planner, planner.plan(shape)) == ()
