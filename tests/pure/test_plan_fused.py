"""An all-reduce and its norm as one op, and weight sharding that pays somewhere: priced, chosen, said, kept."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.arch.presets import preset
from narrows.arch.stages import RowSet
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.cost.devices import DEVICES, Device, device
from narrows.cost.pricer import Pricer, StepShape
from narrows.errors import PlanError
from narrows.layout import Mesh
from narrows.plan.graph import Graph
from narrows.plan.named import AUTO, applicable_layouts
from narrows.plan.plan import ALL_REDUCE_NORM, Op, OpKind, Plan
from narrows.plan.planner import Deployment, Planner, choose_sharding
from narrows.plan.report.code import plan_code
from narrows.plan.report.explain import describe, why
from narrows.plan.report.saved import read_plan, write_plan
from narrows.plan.search import Search

MINI, TP2 = preset("dsv3-mini"), Mesh.of(dp=1, tp=2)


def planner(
    on: Device | None = None, mesh: Mesh = TP2, sharding: WeightSharding | None = None, model: str = "dsv3-mini"
) -> Planner:
    deployment = Deployment(config=preset(model), mesh=mesh, device=on or device("cpu-core"), dtype="bf16", graph=False)
    return Planner(deployment, sharding or WeightSharding())


def decode(rows: int, mesh: Mesh = TP2) -> StepShape:
    return StepShape.of(mesh, (rows,) * mesh.num_groups, phase="decode", context=512)


def fused(plan: Plan) -> list[Op]:
    return [op for _, op in plan.ops() if op.name == ALL_REDUCE_NORM]


def changed(plan: Plan, change: object) -> Plan:
    """``plan`` with ``change`` made to every op that is a reduction and a norm."""
    segments = tuple(
        replace(s, ops=tuple(change(x) if x.name == ALL_REDUCE_NORM else x for x in s.ops))  # type: ignore[operator]
        for s in plan.segments
    )
    return replace(plan, segments=segments)


def test_the_fused_price_is_the_reduction_and_half_the_norms_traffic() -> None:
    on = device("cpu-core")
    plan = planner().plan(decode(4))
    (_, first, *_) = fused(plan)
    assert first.move is not None and first.stage is not None and first.fused
    prices = Pricer(on, TP2, plan.shape, "bf16", itemsize=2, graph=False)
    reduction = prices.move(first.move, 2 * MINI.hidden_size, RowSet.ALL)
    norm = prices.stage(first.stage, first.leaves, True, RowSet.ALL)
    moved = 4 * 4 * MINI.hidden_size * 2
    half = moved / 2 / (on.hbm_bytes_per_s * on.norm_fused_efficiency)
    assert norm.nbytes == moved
    assert first.ps == pytest.approx(reduction.ps + half * 1e12, abs=2)
    assert first.ps < reduction.ps + norm.ps


def test_the_fused_op_is_chosen_only_on_its_devices_and_sizes() -> None:
    assert fused(planner().plan(decode(1))) and fused(planner().plan(decode(8)))
    on = device("cpu-core")
    most = on.fused_norm_bytes // (2 * MINI.hidden_size)
    few = planner(replace(on, fused_norm_bytes=2 * MINI.hidden_size)).plan(decode(2))
    assert not fused(few) and fused(planner(on).plan(decode(2)))
    assert all(op.nbytes <= on.fused_norm_bytes for op in fused(planner().plan(decode(most + 1))))
    for name in DEVICES:
        if not DEVICES[name].shared_memory:
            assert not fused(planner(device(name)).plan(decode(1))), name


def test_named_layouts_keep_both_ops_and_auto_explains_the_fused_one() -> None:
    plans = planner()
    auto, published = plans.plan(decode(1)), plans.plan(decode(1), "all-reduce")
    for name in applicable_layouts(MINI, TP2):
        assert name == "auto" or not fused(plans.plan(decode(1), name))
    assert "all-reduce and norm in one into attention" in describe(auto)
    text = why(auto, published)
    assert "with post_attn_norm as an op of its own" in text and "more" in text.split(":")[0]


def test_code_and_saved_plans_contain_the_fused_op(tmp_path: Path) -> None:
    plan = planner().plan(decode(1))
    tree = ast.parse(plan_code(plan))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == ALL_REDUCE_NORM
    ]
    assert calls and all({"over", "norm"} <= {word.arg for word in call.keywords} for call in calls)
    write_plan(tmp_path / "plan.json", plan, MINI, WeightSharding())
    back, _ = read_plan(tmp_path / "plan.json", MINI, TP2)
    assert back == plan and fused(back)[0].stage is not None


def test_a_plan_whose_fused_op_reads_a_wrong_layout_is_refused() -> None:
    plan = planner().plan(decode(2))
    assert any(op.fused for op in fused(plan))

    def elsewhere(op: Op) -> Op:
        at = op.reads_at[0]
        return replace(op, reads_at=(at,) * len(op.reads))

    with pytest.raises(PlanError, match="all_reduce_norm before post_attn_norm reads residual at"):
        changed(plan, elsewhere).validate()

    def without_residual(op: Op) -> Op:
        return replace(op, reads=op.reads[:1], reads_at=op.reads_at[:1], fused=False)

    with pytest.raises(PlanError, match="all_reduce_norm before post_attn_norm would lose residual"):
        changed(plan, without_residual).validate()


def test_a_joined_residual_cannot_be_added_again_by_the_norm() -> None:
    plan = planner().plan(decode(2), "attn-tp-input-scattered")  # its residual joins the sum before post_attn_norm
    segments = []
    for segment in plan.segments:
        ops: list[Op] = []
        for op in segment.ops:
            if op.stage is not None and op.name == "post_attn_norm":
                reduction = ops.pop()
                assert reduction.name == "all_reduce" and ops[-1].joins
                twice = ("hidden", "residual")
                op = replace(
                    reduction,
                    name=ALL_REDUCE_NORM,
                    stage=op.stage,
                    fused=True,
                    reads=twice,
                    reads_at=(reduction.layout, reduction.leaves),
                    writes=op.writes,
                    writes_at=op.writes_at,
                )
            ops.append(op)
        segments.append(replace(segment, ops=tuple(ops)))
    with pytest.raises(PlanError, match="all_reduce_norm before post_attn_norm reads residual, which no op has left"):
        replace(plan, segments=tuple(segments)).validate()


def test_a_search_without_fused_ops_does_not_price_them() -> None:
    on = device("h100")
    deployment = Deployment(config=MINI, mesh=TP2, device=on, dtype="bf16")
    plans = Planner(deployment, WeightSharding())
    prices = Pricer(on, TP2, decode(2), "bf16", itemsize=2, graph=True)
    assert Search(Graph(plans.chain, TP2, AUTO), prices).solve() == plans.plan(decode(2)).segments


# -- the last layer on the rows with logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "logits", "narrow"), [(4096, 1, True), (4096, 4096, False), (64, 64, False)])
def test_the_last_layer_is_narrow_where_few_rows_have_logits(rows: int, logits: int, narrow: bool) -> None:
    """A decode step, or one that scores every row, has nothing to gain: it selects before the head, as ever."""
    mesh = Mesh.of(dp=1, tp=8)
    shape = StepShape.of(mesh, (rows,), phase="prefill", context=4096, logit_rows=logits)
    plan = planner(device("h100"), mesh, model="deepseek-v3").plan(shape)
    ((layer, _),) = [found for found in plan.ops() if found[1].kind is OpKind.SELECT]
    assert (layer == 60) is narrow
    if narrow:
        assert next(s.rows for at, s in plan.ops() if s.name == "experts" and at == 60) == logits
        assert plan.segments[-2].layers == (60,)
    else:
        assert layer is None and plan.segments[-2].layers == tuple(range(3, 61))


# -- weight sharding --------------------------------------------------------------------------------------------------


def cheapest(mesh: Mesh, rows: int, on: str, **pinned: str) -> WeightSharding:
    """The cheapest weight sharding for a prefill step of ``rows``, ignoring memory."""
    d = Deployment(config=preset("deepseek-v3"), mesh=mesh, device=device(on), dtype="fp8")
    shape = StepShape.of(mesh, (rows // mesh.num_groups,) * mesh.num_groups, phase="prefill", context=4096)
    choices = [f for f in sharding_choices(d.config, mesh) if all(getattr(f, k) == v for k, v in pinned.items())]
    return min(choices, key=lambda sharding: Planner(d, sharding).plan(shape).ps)


def test_a_column_split_projection_costs_its_share_and_its_gather() -> None:
    """Each rank multiplies by an eighth of the columns, and the columns are gathered: the price is both."""
    mesh = Mesh.of(dp=1, tp=8)
    whole, column = (
        planner(device("h100"), mesh, WeightSharding(qkv_a_proj=form), "deepseek-v3")
        for form in ("replicated", "column")
    )
    plans = [each.plan(decode(8, mesh), "auto") for each in (whole, column)]
    names = [[op.name for op in plan.segments[-2].ops] for plan in plans]
    assert "column_gather" not in names[0] and names[1].index("column_gather") > names[1].index("qkv_a_proj")
    costs = [next(s.ps for _, s in plan.ops() if s.name == "qkv_a_proj") for plan in plans]
    assert costs[1] < costs[0]


@pytest.mark.slow
def test_a_column_split_projection_is_chosen_at_few_rows_with_a_cheap_gather() -> None:
    """On cores that share memory a gather of few rows is little beside reading eight times the weights."""
    mesh = Mesh.of(dp=1, tp=8)
    d = Deployment(
        config=preset("deepseek-v3"),
        mesh=mesh,
        device=replace(device("cpu-core"), name="large", memory_bytes=1e12),
        dtype="bf16",
    )
    assert choose_sharding(d, [(decode(1, mesh), 1.0)]).qkv_a_proj == "column"
    prefill = StepShape.of(mesh, (4096,), phase="prefill", context=4096)
    assert choose_sharding(d, [(prefill, 1.0)]).qkv_a_proj == "replicated"


@pytest.mark.slow
def test_a_shared_expert_and_an_embedding_are_replicated_where_that_pays() -> None:
    mesh = Mesh.of(dp=8, tp=1)
    assert cheapest(mesh, 4096, "h200").shared_expert == "replicated"
    assert cheapest(mesh, 64, "h200").shared_expert == "sharded"
    assert cheapest(Mesh.of(dp=1, tp=8), 4096, "h200").embed == "replicated"
    small = Deployment(config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=8), device=device("h20"), dtype="fp8")
    room = small.memory(WeightSharding())
    tight = replace(small, device=replace(small.device, memory_bytes=room.weights + room.process + 1e9))
    assert choose_sharding(tight, [(decode(1, small.mesh), 1.0)]).embed == "vocab"  # the other takes 1.6 GB more
