"""Named layouts equal the published ones, op by op; an inapplicable one names the failed condition."""

from __future__ import annotations

from collections import Counter

import pytest

from narrows.arch.presets import preset
from narrows.arch.stages import PriceClass
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh, split_evenly
from narrows.plan.named import NAMED_LAYOUTS, applicable_layouts, inapplicable, named_layout
from narrows.plan.plan import Op, OpKind, Plan, Segment
from narrows.plan.planner import Deployment, Planner

TP8, DP2, DP8 = Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4), Mesh.of(dp=8, tp=1)


def plan(layout: str, mesh: Mesh, rows: int = 32768, *, model: str = "deepseek-v3", on: str = "h20") -> Plan:
    hardware = device(on)
    dtype = "fp8" if hardware.tflops_fp8 else "bf16"
    deployment = Deployment(config=preset(model), mesh=mesh, device=hardware, dtype=dtype)
    shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=4096)
    found = Planner(deployment, WeightSharding()).plan(shape, layout)
    found.validate()
    return found


def num_moves(found: Plan) -> dict[str, int]:
    moves = Counter(op.name for _, op in found.ops() if op.move is not None and op.name != "slice")
    del moves["column_gather"]  # the best tokens of each vocabulary shard, once per step
    return dict(moves)


def moe_layer(found: Plan) -> Segment:
    return max(found.segments, key=lambda segment: len(segment.layers))


def trail(found: Plan) -> list[str]:
    """The steps of a MoE layer, as 'name layout' or 'name from>to'."""

    def words(op: Op) -> str:
        here, there = (layout.title(found.mesh) or str(layout) for layout in (op.layout, op.leaves))
        return f"{op.name} {here}" if here == there else f"{op.name} {here}>{there}"

    return [words(op) for op in moe_layer(found).ops]


# -- publication A: tensor-parallel attention, dp 1 x tp 8 -------------------------------------------------------------


def test_counts_of_collectives_before_and_after_publication_a() -> None:
    assert num_moves(plan("all-reduce", TP8)) == {"all_reduce": 123}
    after = plan("attn-tp-input-scattered", TP8)
    assert num_moves(after) == {"all_reduce": 62, "reduce_scatter": 61, "all_gather": 61}


def test_the_steps_of_a_layer_before_and_after_publication_a() -> None:
    assert trail(plan("all-reduce", TP8)) == [
        "all_reduce (-,P)>FULL",
        "input_norm FULL",
        "qkv_a_proj FULL",
        "latent_norm FULL",
        "attention FULL>(-,P)",
        "all_reduce (-,P)>FULL",
        "post_attn_norm FULL",
        "router FULL",
        "experts FULL>(-,P)",
    ]
    assert trail(plan("attn-tp-input-scattered", TP8)) == [
        "slice FULL>SCATTERED",
        "reduce_scatter (-,P)>SCATTERED",
        "input_norm SCATTERED",
        "qkv_a_proj SCATTERED",
        "all_gather SCATTERED>FULL",
        "latent_norm FULL",
        "attention FULL>(-,P)",
        "add_residual (-,P)",
        "all_reduce (-,P)>FULL",
        "post_attn_norm FULL",
        "router FULL",
        "experts FULL>(-,P)",
    ]


def test_publication_a_gathers_the_latent_and_joins_an_eighth() -> None:
    ops = {(op.name, op.boundary): op for op in moe_layer(plan("attn-tp-input-scattered", TP8)).ops}
    gather = ops["all_gather", "latent_norm"]
    assert (gather.reads, gather.nbytes) == (("qkv_latent",), 32768 * 2112 * 2)
    join = ops["add_residual", "post_attn_norm"]
    assert join.joins and join.rows == 4096
    assert ops["input_norm", "input_norm"].fused and ops["input_norm", "input_norm"].rows == 4096
    assert not ops["post_attn_norm", "post_attn_norm"].fused  # the residual came in with the sum
    assert ops["post_attn_norm", "post_attn_norm"].rows == 32768


# The published H20 profile, ms: qkv_a_proj, communication, norm.
PUBLISHED = {"all-reduce": (205.1, 267.1, 82.303), "attn-tp-input-scattered": (26.14, 249.63, 43.398)}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_published_profile_within_5_percent(layout: str) -> None:
    totals = plan(layout, TP8).totals()
    found = [1e3 * totals[c] for c in (PriceClass.QKV_A_PROJ, PriceClass.COMMUNICATION, PriceClass.NORM)]
    assert found == pytest.approx(PUBLISHED[layout], rel=0.05)


# -- publication B: data-parallel attention ----------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "groups"), [(DP8, 8), (DP2, 2)], ids=str)
def test_publication_b_norms_a_groups_own_rows_and_then_gathers(mesh: Mesh, groups: int) -> None:
    before, after = plan("all-reduce", mesh, 16384), plan("norm-before-gather", mesh, 16384)

    def norm_and_gather(found: Plan) -> tuple[int, str]:
        ops = moe_layer(found).ops
        norm = next(op for op in ops if op.name == "post_attn_norm")
        (gather,) = [op for op in ops if op.name == "all_gather"]
        assert gather.reads == ("hidden",) and gather.rows == 16384
        return norm.rows, "before" if ops.index(gather) < ops.index(norm) else "after"

    assert norm_and_gather(before) == (16384, "before")
    assert norm_and_gather(after) == (16384 // groups, "after")
    assert after.totals()[PriceClass.NORM] < before.totals()[PriceClass.NORM]
    assert after.ps < before.ps


def test_the_steps_of_a_layer_before_and_after_publication_b() -> None:
    assert trail(plan("all-reduce", DP8)) == [
        "slice FULL>GROUP",
        "all_reduce (P,-)>FULL",
        "slice FULL>GROUP",
        "input_norm GROUP",
        "qkv_a_proj GROUP",
        "latent_norm GROUP",
        "attention GROUP",
        "add_residual GROUP",
        "all_gather GROUP>FULL",
        "post_attn_norm FULL",
        "router FULL",
        "experts FULL>(P,-)",
    ]
    assert trail(plan("norm-before-gather", DP2)) == [
        "all_reduce (P,P)>FULL",
        "slice FULL>GROUP",
        "input_norm GROUP",
        "qkv_a_proj GROUP",
        "latent_norm GROUP",
        "attention GROUP>(S,P)",
        "all_reduce (S,P)>GROUP",
        "post_attn_norm GROUP",
        "all_gather GROUP>FULL",
        "router FULL",
        "experts FULL>(P,P)",
    ]


def test_sequence_parallel_gathers_hidden_at_full_width_into_every_sharded_stage() -> None:
    for mesh in (TP8, DP2):
        found = plan("sequence-parallel", mesh)
        assert num_moves(found) == {"reduce_scatter": 123, "all_gather": 123}
        gathers = [op for _, op in found.ops() if op.name == "all_gather"]
        assert {op.reads for op in gathers} == {("hidden",)}
        norms = [op for _, op in found.ops() if op.name.endswith("_norm") and op.name != "latent_norm"]
        assert {op.rows for op in norms} == {32768 // 8}


# -- all of them -------------------------------------------------------------------------------------------------------


def test_named_layouts_take_the_logit_rows_only_before_the_head() -> None:
    for mesh in (TP8, DP2, DP8):
        for layout in applicable_layouts(preset("deepseek-v3"), mesh)[:-1]:
            (select,) = [op for _, op in plan(layout, mesh).ops() if op.kind is OpKind.SELECT]
            assert select.boundary == "lm_head"
        (select,) = [op for _, op in plan("auto", mesh).ops() if op.kind is OpKind.SELECT]
        assert select.boundary == "post_attn_norm"  # the cheap place: before the last layer's sums and experts


@pytest.mark.parametrize("mesh", [TP8, DP2, DP8], ids=str)
def test_named_layouts_pin_the_published_weight_sharding(mesh: Mesh) -> None:
    config = preset("deepseek-v3")
    for layout in applicable_layouts(config, mesh):
        assert named_layout(layout, config, mesh).sharding == (None if layout == "auto" else WeightSharding())


@pytest.mark.parametrize(
    ("layout", "model", "mesh", "words"),
    [
        ("attn-tp-input-scattered", "llama-3.1-8b", TP8, "llama has no latent attention"),
        ("attn-tp-input-scattered", "glm-4.5", TP8, "glm4_moe has no latent attention"),
        ("attn-tp-input-scattered", "deepseek-v2-lite", TP8, "q_lora_rank is null: queries come from hidden itself"),
        ("attn-tp-input-scattered", "deepseek-v3", DP8, "tp is 1: attention has no ranks to scatter its input over"),
        ("norm-before-gather", "deepseek-v3", TP8, "dp is 1: one attention group already holds all rows"),
        ("sequence-parallel", "deepseek-v3", Mesh.of(dp=1, tp=1), "the mesh has one rank"),
    ],
)
def test_a_layout_that_cannot_apply_names_the_condition(layout: str, model: str, mesh: Mesh, words: str) -> None:
    config = preset(model)
    assert words in inapplicable(layout, config, mesh)
    assert layout not in applicable_layouts(config, mesh)
    with pytest.raises(ConfigError, match=f"layout {layout} cannot apply to {model} on {mesh}: .*{words}"):
        named_layout(layout, config, mesh)


def test_an_unknown_layout_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"layout 'ring' is not known; layouts: {', '.join(NAMED_LAYOUTS)}"):
        named_layout("ring", preset("deepseek-v3"), TP8)


def test_which_layouts_apply_on_which_mesh() -> None:
    v3, llama = preset("deepseek-v3"), preset("llama-3.1-8b")
    assert applicable_layouts(v3, DP2) == NAMED_LAYOUTS
    assert applicable_layouts(v3, TP8) == ("all-reduce", "attn-tp-input-scattered", "sequence-parallel", "auto")
    assert applicable_layouts(v3, DP8) == ("all-reduce", "norm-before-gather", "sequence-parallel", "auto")
    assert applicable_layouts(llama, DP2) == ("all-reduce", "norm-before-gather", "sequence-parallel", "auto")
    assert applicable_layouts(llama, Mesh.of(dp=1, tp=1)) == ("all-reduce", "auto")
