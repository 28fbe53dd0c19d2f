"""Chains of stages: forward order, layouts, shapes and FLOPs of every family, and meshes that cannot be."""

from __future__ import annotations

import pytest

from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig
from narrows.arch.presets import PRESETS, preset
from narrows.arch.stages import AttentionCore, Chain, Gemm, GroupedGemm, RowSet, Stage, StageKind
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.errors import ConfigError
from narrows.layout import Mesh, full, group, owed

ONE = Mesh.of(dp=1, tp=1)
MESH = Mesh.of(dp=2, tp=4)

MLA_LAYER = ["input_norm", "qkv_a_proj", "latent_norm", "attention", "post_attn_norm"]
EPILOGUE = ["final_norm", "lm_head", "shard_argmax", "pick"]


def names(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.name for stage in stages]


def stage_of(chain: Chain, name: str) -> Stage:
    stages = (*chain.prologue, *(s for layer in chain.layer_types for s in layer.stages), *chain.epilogue)
    return next(stage for stage in stages if stage.name == name)


def all_stages(chain: Chain) -> list[Stage]:
    layers = [stage for index in chain.layers for stage in chain.layer_types[index].stages]
    return [*chain.prologue, *layers, *chain.epilogue]


def test_a_deepseek_chain_reads_in_forward_order() -> None:
    chain = build_chain(preset("deepseek-v3"), MESH)
    assert names(chain.prologue) == ["embed"]
    assert [layer.name for layer in chain.layer_types] == ["dense", "moe", "moe"]
    assert chain.layers == (*(0,) * 3, *(1,) * 57, 2)
    assert names(chain.layer_types[2].stages) == names(chain.layer_types[1].stages)
    assert [stage.name for stage in chain.layer_types[2].stages if stage.any_rows] == [
        "post_attn_norm",
        "router",
        "experts",
    ]
    assert names(chain.layer_types[0].stages) == [*MLA_LAYER, "mlp"]
    assert names(chain.layer_types[1].stages) == [*MLA_LAYER, "router", "experts"]
    assert names(chain.epilogue) == EPILOGUE


def test_chains_of_the_other_families() -> None:
    llama = build_chain(preset("llama-3.1-8b"), MESH)
    assert [names(layer.stages) for layer in llama.layer_types] == [
        ["input_norm", "attention", "post_attn_norm", "mlp"]
    ] * 2
    assert llama.layers == (0,) * 31 + (1,)
    assert stage_of(llama, "attention").reads == ("hidden",)
    qwen = build_chain(preset("qwen3-30b-a3b"), MESH)
    assert [layer.name for layer in qwen.layer_types] == ["moe", "moe"]
    glm = build_chain(preset("glm-4.5"), MESH)
    assert glm.layers == (0,) * 3 + (1,) * 88 + (2,)


def test_without_a_low_rank_query_attention_reads_hidden_too() -> None:
    lite = build_chain(preset("deepseek-v2-lite"), MESH)
    assert stage_of(lite, "attention").reads == ("hidden", "qkv_latent")
    assert stage_of(lite, "qkv_a_proj").frees == ()
    v3 = build_chain(preset("deepseek-v3"), MESH)
    assert stage_of(v3, "attention").reads == ("qkv_latent",)
    assert stage_of(v3, "qkv_a_proj").frees == ("hidden",)


def test_layouts_of_inputs_and_outputs_of_sharded_stages() -> None:
    chain = build_chain(preset("deepseek-v3"), MESH)
    found = {s.name: (s.accepts, s.leaves) for s in all_stages(chain) if s.kind is StageKind.SHARDED}
    assert found["embed"] == (full(MESH), owed(MESH))
    assert found["attention"] == (group(MESH), owed(MESH, 1))
    assert found["mlp"] == found["experts"] == (full(MESH), owed(MESH))
    assert found["lm_head"][1] is not None and str(found["lm_head"][1]) == "(C,C)"
    assert {s.row_set for s in chain.epilogue[1:]} == {RowSet.LOGITS}


def test_weight_sharding_changes_the_chain() -> None:
    sharding = WeightSharding(embed="replicated", qkv_a_proj="column", shared_expert="replicated", experts="whole")
    chain = build_chain(preset("deepseek-v3"), MESH, sharding)
    assert stage_of(chain, "embed").kind is StageKind.ROW
    column = stage_of(chain, "qkv_a_proj")
    assert (column.accepts, str(column.leaves)) == (group(MESH), "(S,C)")
    assert column.work == (Gemm(528, 7168),)
    assert names(chain.layer_types[1].stages) == [*MLA_LAYER, "router", "shared_expert", "experts"]
    assert stage_of(chain, "shared_expert").kind is StageKind.ROW
    experts = [work for work in stage_of(chain, "experts").work if isinstance(work, GroupedGemm)]
    assert [(work.experts, work.n, work.k) for work in experts] == [(32, 4096, 7168), (32, 7168, 2048)]


def test_shapes_of_the_largest_rank() -> None:
    chain = build_chain(preset("deepseek-v3"), Mesh.of(dp=1, tp=8))
    assert stage_of(chain, "qkv_a_proj").work == (Gemm(1536 + 512 + 64, 7168),)
    q_b, kv_b, core, o_proj = stage_of(chain, "attention").work
    assert (q_b, kv_b, o_proj) == (Gemm(16 * 192, 1536), Gemm(16 * 256, 512), Gemm(7168, 16 * 128))
    assert isinstance(core, AttentionCore)
    assert (core.heads, core.prefill_dims, core.decode_dims, core.kv_row_bytes) == (16, 320, 1088, 1152)
    assert stage_of(chain, "mlp").work[0] == Gemm(2 * 2304, 7168)
    grouped = [work for work in stage_of(chain, "experts").work if isinstance(work, GroupedGemm)]
    assert [(work.experts, work.pairs_per_row, work.n) for work in grouped] == [(256, 8, 512), (256, 8, 7168)]
    assert chain.fields["qkv_latent"].row_bytes == 2112 * 2
    uneven = build_chain(preset("deepseek-v2-lite"), Mesh.of(dp=1, tp=3))
    assert stage_of(uneven, "attention").work[0] == Gemm(6 * 192, 2048)  # 16 heads: 6, 5, 5
    few_kv = build_chain(preset("qwen3-235b-a22b"), Mesh.of(dp=1, tp=8))
    assert stage_of(few_kv, "attention").work[0] == Gemm((8 + 2 * 1) * 128, 4096)  # 4 key-value heads on 8 ranks


# Parameters that a token uses, less the embedding it looks up: 37 B for DeepSeek-V3 in the model's own report.
ACTIVE = {
    "deepseek-v3": 36.6e9,
    "deepseek-v2": 20.9e9,
    "kimi-k2": 31.7e9,
    "qwen3-30b-a3b": 3.04e9,
    "llama-3.1-8b": 7.5e9,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_multiplications_per_row_are_the_active_parameters(name: str) -> None:
    chain, total = build_chain(preset(name), ONE), 0.0
    for stage in all_stages(chain):
        for work in stage.work:
            if isinstance(work, Gemm):
                total += work.n * work.k
            elif isinstance(work, GroupedGemm):
                total += work.pairs_per_row * work.n * work.k
    assert total == pytest.approx(ACTIVE[name], rel=0.01)


def test_one_rank_or_wanted_logits_need_no_candidates() -> None:
    assert names(build_chain(preset("llama-3.1-8b"), ONE).epilogue) == ["final_norm", "lm_head", "sample"]
    wanted = build_chain(preset("llama-3.1-8b"), MESH, want_logits=True)
    assert names(wanted.epilogue) == ["final_norm", "lm_head", "sample"]
    assert stage_of(wanted, "sample").accepts == full(MESH)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_is_written_before_it_is_read(name: str) -> None:
    config = preset(name)
    for sharding in sharding_choices(config, MESH):
        chain = build_chain(config, MESH, sharding)
        live = {"ids"}
        for stage in all_stages(chain):
            needed = set(stage.reads) - ({"residual"} if stage.kind is StageKind.NORM else set())
            assert needed <= live, (stage.name, needed - live)
            assert set(stage.reads) | set(stage.writes) <= set(chain.fields)
            live = (live - set(stage.frees)) | set(stage.writes)
        assert "next_ids" in live


def test_an_axis_more_changes_nothing_but_the_groups() -> None:
    """No code counts on two axes: with a third, attention shards over the last one, the rest over the world."""
    three = Mesh.of(pod=2, dp=2, tp=2)
    chain = build_chain(preset("deepseek-v3"), three)
    attention = stage_of(chain, "attention")
    assert (str(attention.accepts), str(attention.leaves)) == ("(S,S,R)", "(S,S,P)")
    assert stage_of(chain, "mlp").work[0] == Gemm(2 * 2304, 7168)
    assert stage_of(chain, "attention").work[0] == Gemm(64 * 192, 1536)


@pytest.mark.parametrize(
    ("name", "mesh", "words"),
    [
        (
            "llama-3.1-8b",
            Mesh.of(dp=1, tp=64),
            "tp 64 is larger than the 32 attention heads of llama-3.1-8b, and a head is not split; on 64 ranks these "
            "work: dp 2 x tp 32, dp 4 x tp 16, dp 8 x tp 8, dp 16 x tp 4",
        ),
        ("qwen3-30b-a3b", Mesh.of(dp=64, tp=16), "1024 ranks, more than moe_intermediate_size 768 of qwen3-30b-a3b"),
    ],
)
def test_a_mesh_with_more_ranks_than_units_is_refused(name: str, mesh: Mesh, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_chain(preset(name), mesh)
    assert words in str(caught.value)


def test_sharding_choices_are_distinct_and_begin_with_the_published() -> None:
    def count(config: ModelConfig, mesh: Mesh) -> int:
        choices = sharding_choices(config, mesh)
        assert choices[0] == WeightSharding() and len(set(choices)) == len(choices)
        return len(choices)

    v3, llama = preset("deepseek-v3"), preset("llama-3.1-8b")
    assert count(v3, MESH) == 16
    assert count(v3, Mesh.of(dp=8, tp=1)) == 8  # no column sharding without ranks in a group
    assert count(v3, ONE) == 1
    assert count(llama, MESH) == 2
