"""Configs that were once read wrongly, crashed, hung, or were refused though legal: each right, or one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from narrows.arch.config import GQA, MLA, ModelConfig, read_config
from narrows.arch.configs.deepseek import DeepseekV2, DeepseekV3
from narrows.arch.configs.mistral import Mistral
from narrows.arch.configs.qwen import Qwen2, Qwen3Moe
from narrows.arch.configs.schema import Schema
from narrows.arch.rope import LinearRope, Llama3Rope, LongRope, YarnRope
from narrows.errors import CheckpointError, ConfigError

PLAIN = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 99}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
RAW: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mistral": PLAIN | {"sliding_window": None},
    "qwen2": PLAIN | {"num_key_value_heads": 4},
    "qwen3": PLAIN | {"num_key_value_heads": 4},
    "qwen3_moe": PLAIN | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
    "deepseek_v2": PLAIN | LATENT | ROUTED,
    "deepseek_v3": PLAIN | LATENT | ROUTED,
    "glm4_moe": PLAIN | ROUTED,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def read(family: str, /, **changes: Any) -> ModelConfig:
    return read_config(RAW[family] | {"model_type": family} | changes, "c.json")


def schema(kind: type[Schema], /, **changes: Any) -> ModelConfig:
    """The config that a schema reads from fields, also from those that no model computes yet."""
    raw = RAW[kind.model_types[0]] | {"model_type": kind.model_types[0]} | changes
    return kind.read(raw, "c.json")


# -- once silently wrong -----------------------------------------------------------------------------------------------


def test_fields_left_out_take_the_familys_published_defaults() -> None:
    v3, v2, glm = (read(family).moe for family in ("deepseek_v3", "deepseek_v2", "glm4_moe"))
    assert v3 is not None and v2 is not None and glm is not None
    assert (v3.norm_topk_prob, v3.routed_scaling_factor, v3.n_group, v3.topk_group) == (True, 2.5, 8, 4)
    assert (v3.n_shared_experts, v3.first_k_dense_replace) == (1, 3)
    assert (v2.norm_topk_prob, v2.routed_scaling_factor, v2.n_group, v2.topk_group) == (False, 1.0, 1, 1)
    assert (v2.n_shared_experts, v2.first_k_dense_replace, v2.topk_method) == (2, 0, "greedy")
    assert (glm.n_shared_experts, glm.first_k_dense_replace, glm.norm_topk_prob) == (1, 1, True)
    assert read("glm4_moe").rope.partial_rotary_factor == 0.5 and read("glm4_moe").rms_norm_eps == 1e-5
    qwen3, llama = read("qwen3").attention, read("llama").attention
    assert isinstance(qwen3, GQA) and qwen3.head_dim == 128
    assert isinstance(llama, GQA) and (llama.head_dim, llama.num_key_value_heads) == (8, 8)
    assert [read(name).max_position_embeddings for name in ("llama", "qwen2", "mistral", "deepseek_v3")] == [
        *(2048, 32768, 131072, 4096)
    ]
    assert schema(Mistral, sliding_window=77).attention == replace(
        schema(Mistral).attention, sliding_window=77, sliding_layers=frozenset(range(4))
    )
    left_out = {name: value for name, value in RAW["mistral"].items() if name != "sliding_window"}
    mistral = Mistral.read(left_out | {"model_type": "mistral"}, "c.json")
    assert mistral.sliding_window(0) == mistral.sliding_window(3) == 4096


@pytest.mark.parametrize("family", RAW)
def test_a_missing_size_is_an_error(family: str) -> None:
    optional = {"intermediate_size"} if family in ("qwen3_moe", "deepseek_v2") else set()
    for field in RAW[family].keys() - {"num_key_value_heads", "sliding_window"} - optional:
        raw = {name: value for name, value in RAW[family].items() if name != field}
        with pytest.raises(CheckpointError, match=rf"^c\.json: the field '{field}' is missing"):
            read_config(raw | {"model_type": family}, "c.json")


def test_rope_is_read_from_every_place_that_may_hold_it() -> None:
    rope = read("llama", rope_scaling=LINEAR | {"rope_theta": 5e5}).rope
    assert (rope.rope_theta, rope.scaling) == (5e5, LinearRope(factor=2.0))
    places: list[dict[str, Any]] = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": LINEAR | {"type": "linear"}},
        {"rope_parameters": LINEAR | {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5} | LINEAR, "rope_theta": 5e5, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR, "rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_scaling": {}},
    ]
    assert [read("llama", **place).rope for place in places] == [rope] * len(places)
    yarn = read("llama", max_position_embeddings=8192, rope_scaling=YARN).rope.scaling
    assert yarn == YarnRope(factor=4.0, original_max_position_embeddings=1024)
    derived = read("llama", max_position_embeddings=8192, rope_scaling=YARN | {"factor": None}).rope.scaling
    assert derived == replace(yarn, factor=8.0)
    llama3 = read("llama", rope_scaling=LLAMA3).rope.scaling
    assert llama3 == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=2048
    )
    factors = {"short_factor": [1, 1, 2, 2], "long_factor": [1.5, 2, 3, 4]}
    long = schema(
        DeepseekV3, rope_scaling={"type": "longrope"} | factors, original_max_position_embeddings=1024
    ).rope.scaling
    assert isinstance(long, LongRope) and long.original_max_position_embeddings == 1024
    assert (long.factor, long.long_factor) == (4.0, (1.5, 2.0, 3.0, 4.0))
    latent = read("deepseek_v2", rope_scaling=LINEAR | {"mscale_all_dim": 0.7}).rope.scaling
    assert latent == LinearRope(factor=2.0, mscale_all_dim=0.7)


def test_differences_between_engines_are_noted() -> None:
    for family, changes in (
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
    ):
        config = read(family, **changes)
        (field, value), (note,) = next(iter(changes.items())), config.notes
        assert getattr(config.moe, field) == value and note.startswith(f'{field} "{value}" is obeyed')
    (note,) = read("deepseek_v2", norm_topk_prob=True).notes
    assert note.startswith("norm_topk_prob is not used")
    assert read("deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc").notes == ()


def test_variants_reach_the_stages_that_compute_them() -> None:
    assert not schema(DeepseekV3, rope_interleave=False).rope.interleaved
    assert not schema(DeepseekV3, rope_interleave=None).rope.interleaved  # as transformers takes it
    assert schema(DeepseekV3).rope.interleaved and schema(DeepseekV2).rope.interleaved
    biased = schema(DeepseekV3, attention_bias=True).attention
    assert isinstance(biased, MLA) and biased.attention_bias
    assert schema(DeepseekV2, mlp_bias=True).mlp_bias
    windows = schema(Qwen2, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    assert [windows.sliding_window(layer) for layer in range(4)] == [None, None, None, 16]
    kinds = ["sliding_attention", "full_attention", "attention", "sliding_attention"]
    named = schema(Qwen2, use_sliding_window=True, sliding_window=16, layer_types=kinds)
    assert [named.sliding_window(layer) for layer in range(4)] == [16, None, None, 16]
    every = schema(Qwen3Moe, use_sliding_window=True, sliding_window=16)
    assert [every.sliding_window(layer) for layer in range(4)] == [16] * 4
    sparse = schema(Qwen3Moe, decoder_sparse_step=2, mlp_only_layers=[1])
    assert [sparse.is_moe_layer(layer) for layer in range(4)] == [False, False, False, True]
    every_second = schema(DeepseekV2, moe_layer_freq=2, first_k_dense_replace=1)
    assert [every_second.is_moe_layer(layer) for layer in range(4)] == [False, False, True, False]
    assert schema(Qwen2, hidden_act="gelu").hidden_act == "gelu"
    assert schema(Qwen2, hidden_act="swish").hidden_act == "silu"


def test_quantised_weights_are_recognised_under_all_names() -> None:
    mlx = {"group_size": 64, "bits": 4}
    for changes, method in (
        ({"quantization": mlx, "quantization_config": mlx}, "mlx"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ):
        quantization = read("qwen3", **changes).quantization
        assert quantization is not None and quantization.quant_method == method


# -- once refused although legal ---------------------------------------------------------------------------------------


def test_legal_configs_are_read() -> None:
    qwen = read("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=4)
    assert isinstance(qwen.attention, GQA) and qwen.attention.sliding_window is None
    assert read("qwen2", use_sliding_window=False, sliding_window=16, max_window_layers=0).sliding_window(0) is None
    assert read("deepseek_v3", n_group=None, topk_group=None).moe is not None
    assert read("llama", index_topk=None, num_experts=0, logits_scaling=1.0, rope_interleaved=False).notes == ()
    assert read("llama", _name_or_path="x", auto_map={}, torch_dtype="torch.float16").dtype == "float16"
    unset = {"bias": "none", "attention_scale": 1.0, "position_embedding_type": "rope", "rope_type": "default"}
    assert read("llama", **unset).notes == ()
    (note,) = read("llama", embed_magic=3, rope_scaling=LINEAR | {"finetuned": True}).notes
    assert note.endswith(": embed_magic, rope_scaling.finetuned")


# -- refused, in one line ----------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": "yarn"}, 'rope_scaling is "yarn", where an object or null is needed'),
    ("llama", {"rope_scaling": 3}, "rope_scaling is 3, where an object"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling is [1], where an object"),
    ("llama", {"rope_scaling": True}, "rope_scaling is true, where an object"),
    ("llama", {"rope_theta": [1e4]}, "rope_theta is [10000.0], where a number above 1 is needed"),
    ("llama", {"rope_theta": "1e4"}, 'rope_theta is "1e4", where a number'),
    ("llama", {"rope_theta": True}, "rope_theta is true, where a number"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0, where a number"),
    ("llama", {"rope_theta": None}, "rope_theta is null, where a number"),
    (
        "llama",
        {"rope_theta": 1e4, "rope_scaling": LINEAR | {"rope_theta": 5e5}},
        "rope_theta is 10000.0 and rope_scaling",
    ),
    ("llama", {"rope_parameters": YARN, "rope_scaling": LINEAR}, "rope_parameters and rope_scaling differ"),
    ("llama", {"rope_scaling": LINEAR | {"type": "yarn"}}, 'rope_scaling has rope_type "linear" and type "yarn"'),
    ("llama", {"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor while its rope_type is missing"),
    ("llama", {"rope_scaling": LINEAR | {"rope_type": "default"}}, 'has factor while its rope_type says "default"'),
    ("llama", {"rope_scaling": {"rope_type": "su"}}, 'rope_type "su", which is not supported; supported are default'),
    ("llama", {"rope_scaling": {"rope_type": 1}}, "rope_scaling.rope_type is 1, where a text is needed"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "the field 'rope_scaling.factor' is missing"),
    ("llama", {"rope_scaling": LINEAR | {"factor": "2"}}, 'rope_scaling.factor is "2", where a number above 0'),
    ("llama", {"rope_scaling": LINEAR | {"factor": True}}, "rope_scaling.factor is true, where a number above 0"),
    (
        "llama",
        {"rope_scaling": LINEAR | {"factor": float("nan")}},
        "rope_scaling.factor is NaN, where a number above 0",
    ),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
        "high_freq_factor 1 of rope_type llama3 must be above",
    ),
    ("llama", {"rope_scaling": YARN | {"mrope_section": [1]}}, "rope_scaling.mrope_section is [1], which stands for"),
    ("llama", {"rope_parameters": {"full_attention": LINEAR}}, 'differs by kind of layer, ["full_attention"], which'),
    ("llama", {"rope_parameters": {"\x1f\x7f": LINEAR}}, r'differs by kind of layer, ["\u001f\u007f"], which'),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5; heads of this model_type are rotated whole",
    ),
    ("llama", {"rope_interleave": True}, "rope_interleave is true; only false is computed"),
    ("deepseek_v2", {"rope_interleave": False}, "rope_interleave is false; only true is computed"),
    ("llama", {"head_dim": 0}, "head_dim is 0, where a whole number from 1"),
    ("llama", {"head_dim": 7}, "heads of 7 columns cannot be rotated in pairs"),
    ("llama", {"hidden_size": 65}, "hidden_size 65 does not divide into 8 attention heads; head_dim is needed"),
    (
        "llama",
        {"num_attention_heads": 10_000_000},
        "num_attention_heads is 10000000, where a whole number from 1 to 8192",
    ),
    ("llama", {"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000, where a whole number from 1 to 1024"),
    ("llama", {"hidden_size": 10**400}, "hidden_size is 1000"),
    ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, where a whole number"),
    ("llama", {"num_key_value_heads": 3}, "8 attention heads do not divide into groups for num_key_value_heads 3"),
    ("qwen2", {"num_key_value_heads": 5}, "do not divide into groups"),
    ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts of 4 groups"),
    ("deepseek_v3", {"n_routed_experts": 4}, "n_routed_experts 4 does not divide into n_group 8 groups"),
    ("deepseek_v3", {"n_group": 2, "topk_group": 3}, "topk_group is 3, more than n_group 2"),
    ("qwen3_moe", {"num_experts_per_tok": 17}, "num_experts_per_tok is 17, more than num_experts, which is 16"),
    ("deepseek_v2", {"num_experts_per_tok": 17}, "num_experts_per_tok is 17, more than n_routed_experts, which is 16"),
    ("deepseek_v3", {"num_local_experts": 8}, "n_routed_experts is 16 and num_local_experts, its other name, is 8"),
    ("deepseek_v3", {"norm_topk_prob": "true"}, 'norm_topk_prob is "true", where true or false'),
    ("deepseek_v3", {"routed_scaling_factor": "2"}, 'routed_scaling_factor is "2", where a number'),
    ("qwen3_moe", {"mlp_only_layers": 0}, "mlp_only_layers is 0, where a list of layers' indices"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers is [-1], where a list of layers' indices"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, where a whole number from 1"),
    ("llama", {"eos_token_id": "2"}, 'eos_token_id is "2", where a token id'),
    ("llama", {"eos_token_id": -1}, "eos_token_id is -1, where a token id"),
    ("llama", {"eos_token_id": [1, 2.5]}, "eos_token_id is [1, 2.5], where a token id"),
    ("llama", {"bos_token_id": True}, "bos_token_id is true, where a token id"),
    ("llama", {"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", where true or false is needed'),
    ("llama", {"attention_bias": 1}, "attention_bias is 1, where true or false is needed"),
    ("llama", {"mlp_bias": "no"}, 'mlp_bias is "no", where true or false is needed'),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is Infinity, where a number"),
    ("llama", {"hidden_act": None}, "hidden_act is null, where a text is needed"),
    ("llama", {"dtype": "int4"}, 'dtype is "int4", where one of bfloat16'),
    ("llama", {"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype is float32 and torch_dtype bfloat16"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 4"),
    ("qwen2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, 'layer_types names "chunked_attention"'),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types names sliding_attention for 4 layers, but"),
    ("qwen2", {"attention_bias": False}, "attention_bias is false; only true is computed"),
    ("deepseek_v3", {"mlp_bias": True}, "mlp_bias is true; only false is computed"),
    ("deepseek_v3", {"index_topk": 2048, "index_n_heads": 64}, "index_topk is 2048, which stands for attention by an"),
    ("llama", {"q_lora_rank": 16}, "q_lora_rank is 16, which stands for latent attention"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8, which stands for routed experts"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8, which stands for"),
    ("llama", {"sliding_window": 16}, "sliding_window is 16, which stands for attention to a part of the context"),
    ("mistral", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, which stands for parts of Gemma"),
    (
        "llama",
        {"architectures": ["Olmo2ForCausalLM"]},
        'architectures is ["Olmo2ForCausalLM"], where model_type "llama"',
    ),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is"),
    ("llama", {"rotary_base": 1e6}, "rotary_base is 1000000.0, which stands for other positions"),
    ("llama", {"rope_ratio": 500}, "rope_ratio is 500, which stands for other positions"),
    ("qwen2", {"softmax_scale": 0.5}, "softmax_scale is 0.5, which stands for scaled activations"),
    ("mistral", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"; only "silu" is computed'),
    ("llama", {"is_causal": False}, "is_causal is false; only true is computed"),
    ("llama", {"model_type": None}, "model_type is missing"),
    ("llama", {"model_type": 3}, "model_type is 3, where a text is needed"),
    ("llama", {"model_type": "mamba"}, 'architecture "mamba" is not supported; supported are deepseek_v2'),
]


@pytest.mark.parametrize(("family", "changes", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_config_is_a_one_line_error_with_the_valid_values(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(family, **changes)
    said = str(caught.value)
    assert words in said and said.startswith("c.json: ") and "\n" not in said and len(said) < 500
