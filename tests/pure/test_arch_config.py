"""Configs of every family, as transformers 4 and 5 write them, the presets, and errors of wrong configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from narrows.arch.config import GQA, MLA, ModelConfig, read_config
from narrows.arch.positions import cache_salt, most_positions
from narrows.arch.presets import PRESETS, load_model_config, preset
from narrows.errors import CheckpointError, ConfigError

COMMON: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
MLA_FIELDS = {
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 16,
}
ROUTED = {
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
GQA_FIELDS = {"num_key_value_heads": 4, "head_dim": 128}
YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# family: (fields that both spell alike, fields as version 4 spells them, fields as version 5 does)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "deepseek_v2": (
        COMMON | MLA_FIELDS | ROUTED | {"topk_method": "group_limited_greedy", "num_nextn_predict_layers": 0},
        {"rope_theta": 10000, "rope_scaling": YARN | {"type": "yarn"}, "torch_dtype": "bfloat16", "moe_layer_freq": 1},
        {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}, "dtype": "bfloat16"},
    ),
    "deepseek_v3": (
        COMMON | MLA_FIELDS | ROUTED | {"num_nextn_predict_layers": 1},
        {
            "rope_theta": 10000,
            "rope_scaling": YARN | {"type": "yarn"},
            "torch_dtype": "bfloat16",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}, "dtype": "bfloat16"},
    ),
    "kimi_k2": (
        COMMON | MLA_FIELDS | ROUTED | {"n_group": 1, "topk_group": 1},
        {"rope_theta": 50000.0, "torch_dtype": "bfloat16", "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "dtype": "bfloat16"},
    ),
    "llama": (
        COMMON | GQA_FIELDS | {"tie_word_embeddings": True},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "torch_dtype": "float32"},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}, "dtype": "float32"},
    ),
    "qwen2": (
        COMMON | GQA_FIELDS | {"use_sliding_window": False},
        {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "sliding_window": 32768},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"},
    ),
    "qwen3": (
        COMMON | GQA_FIELDS | {"attention_bias": False},
        {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"},
    ),
    "qwen3_moe": (
        COMMON
        | GQA_FIELDS
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {"rope_theta": 1e6, "torch_dtype": "bfloat16", "num_experts": 128},
        {
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "dtype": "bfloat16",
            "num_local_experts": 128,
        },
    ),
    "glm4_moe": (
        COMMON | GQA_FIELDS | ROUTED | {"attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1},
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "torch_dtype": "bfloat16"},
        {
            "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"},
            "dtype": "bfloat16",
        },
    ),
}


def raw_config(family: str, version: int = 4, **changes: Any) -> dict[str, Any]:
    alike, four, five = FAMILIES[family]
    return alike | (four if version == 4 else five) | {"model_type": family} | changes


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_mean_the_same_model(family: str) -> None:
    four, five = (read_config(raw_config(family, version)) for version in (4, 5))
    assert four == five


def test_deepseek_v3_in_full() -> None:
    config = read_config(raw_config("deepseek_v3"), "tiny")
    assert config.name == "tiny"
    assert isinstance(config.attention, MLA) and config.moe is not None
    assert config.attention.qkv_latent_dim == 384 + 512 + 64
    assert (config.attention.qk_head_dim, config.attention.latent_dim) == (192, 576)
    assert (config.moe.scoring_func, config.moe.topk_method) == ("sigmoid", "noaux_tc")
    assert (config.moe.n_group, config.moe.topk_group, config.moe.routed_scaling_factor) == (4, 2, 2.5)
    assert config.moe.shared_intermediate_size == 256
    assert [config.is_moe_layer(layer) for layer in range(4)] == [False, True, True, True]
    assert config.eos_token_id == (1,)
    assert config.notes == (
        "1 multi-token-prediction layer(s) of the checkpoint are skipped: narrows predicts one token",
    )


def test_differences_between_families() -> None:
    def attention(family: str, **changes: Any) -> MLA | GQA:
        return read_config(raw_config(family, **changes)).attention

    def moe_of(family: str) -> Any:
        return read_config(raw_config(family)).moe

    qwen2, qwen3, glm = attention("qwen2"), attention("qwen3"), attention("glm4_moe")
    assert isinstance(qwen2, GQA) and qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm
    assert isinstance(qwen3, GQA) and qwen3.qk_norm and not qwen3.qkv_bias
    assert isinstance(glm, GQA) and glm.qkv_bias and not glm.o_bias and glm.qk_norm
    assert read_config(raw_config("glm4_moe")).rope.partial_rotary_factor == 0.5
    for family in ("llama", "qwen3", "qwen3_moe"):
        biased = attention(family, attention_bias=True)
        assert isinstance(biased, GQA) and biased.qkv_bias and biased.o_bias
    lite = attention("deepseek_v2", q_lora_rank=None)
    assert isinstance(lite, MLA) and lite.q_lora_rank is None and lite.qkv_latent_dim == 576
    assert read_config(raw_config("kimi_k2")).model_type == "deepseek_v3"
    assert (moe_of("deepseek_v2").scoring_func, moe_of("deepseek_v2").topk_method) == (
        "softmax",
        "group_limited_greedy",
    )
    assert moe_of("deepseek_v2").norm_topk_prob is False  # transformers' V2 router never normalises
    assert (moe_of("glm4_moe").scoring_func, moe_of("glm4_moe").topk_method) == ("sigmoid", "noaux_tc")
    assert (moe_of("qwen3_moe").scoring_func, moe_of("qwen3_moe").n_shared_experts) == ("softmax", 0)
    assert read_config(raw_config("llama")).moe is None


def test_defaults_of_missing_fields() -> None:
    raw = raw_config("llama")
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "torch_dtype", "eos_token_id"):
        del raw[name]
    del raw["rms_norm_eps"], raw["tie_word_embeddings"]
    config = read_config(raw)
    assert config.attention == GQA(num_key_value_heads=16, head_dim=64)
    assert (config.rope.rope_theta, config.rope.as_mapping(), config.dtype, config.eos_token_id) == (
        10000.0,
        None,
        "bfloat16",
        (),
    )
    assert config.rms_norm_eps == 1e-6
    assert read_config(raw_config("llama", eos_token_id=[7, 8])).eos_token_id == (7, 8)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model_type": "mamba"}, ConfigError, 'architecture "mamba" is not supported; supported are deepseek_v2'),
        (
            {"model_type": None},
            ConfigError,
            "model_type is missing, which names the architecture; supported are deepseek_v2",
        ),
        (
            {"hidden_size": None},
            CheckpointError,
            "hidden_size is null, where a whole number from 1 to 1048576 is needed",
        ),
        ({"hidden_size": "big"}, CheckpointError, 'hidden_size is "big", where a whole number from 1 to'),
        (
            {"num_hidden_layers": 0},
            CheckpointError,
            "num_hidden_layers is 0, where a whole number from 1 to 1024 is needed",
        ),
        ({"num_attention_heads": -4}, CheckpointError, "num_attention_heads is -4, where a whole number"),
        ({"kv_lora_rank": None}, CheckpointError, "kv_lora_rank is null, where a whole number"),
        (
            {"q_lora_rank": "x"},
            CheckpointError,
            'q_lora_rank is "x", where a whole number from 1 to 1048576, or null is needed',
        ),
        ({"intermediate_size": None}, CheckpointError, "the field 'intermediate_size' is missing"),
        ({"hidden_act": "prelu"}, ConfigError, 'hidden_act "prelu" is not known'),
        ({"topk_method": "magic"}, ConfigError, 'scoring_func "sigmoid" with topk_method "magic" is not known'),
        ({"n_group": 5}, CheckpointError, "n_routed_experts 32 does not divide into n_group 5 groups"),
        (
            {"num_experts_per_tok": 33},
            CheckpointError,
            "num_experts_per_tok is 33, more than the 16 experts of 2 groups",
        ),
        ({"topk_group": 9}, CheckpointError, "topk_group is 9, more than n_group 4"),
        ({"rms_norm_eps": "tiny"}, CheckpointError, 'rms_norm_eps is "tiny", where a number from 0 is needed'),
    ],
)
def test_a_wrong_config_is_a_one_line_error_naming_the_field(
    changes: dict[str, Any], kind: type[ConfigError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        read_config(raw_config("deepseek_v3", **changes), "v3.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("v3.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"num_key_value_heads": 3}, "16 attention heads do not divide into groups for num_key_value_heads 3"),
    ],
)
def test_variants_that_are_not_supported_are_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(raw_config(family, **changes))


def test_config_paths_and_their_errors(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_model_config(str(folder))
    file = folder / "config.json"
    file.write_text("{not json", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model_config(str(file))
    file.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        load_model_config(str(folder))
    file.write_text(json.dumps(raw_config("llama")), encoding="utf-8")
    assert load_model_config(str(folder)) == load_model_config(str(file))
    assert load_model_config(str(folder)).name == "my-model"


# The rows of the dimension table of the public configs, and of the two for benchmarks: hidden, layers (dense first),
# heads (kv), q_lora, kv_lora, nope/rope/v, dense FFN, MoE FFN, experts/top-k/shared, groups (n/top), vocabulary; -
# where a family has none.
TABLE = """
deepseek-v2      5120 60 1 128 - 1536 512 128/64/128 12288 1536 160/6/2 8/3 102400
deepseek-v2-lite 2048 27 1 16  - none 512 128/64/128 10944 1408 64/6/2  1/1 102400
deepseek-v3      7168 61 3 128 - 1536 512 128/64/128 18432 2048 256/8/1 8/4 129280
deepseek-r1      7168 61 3 128 - 1536 512 128/64/128 18432 2048 256/8/1 8/4 129280
kimi-k2          7168 61 1 64  - 1536 512 128/64/128 18432 2048 384/8/1 1/1 163840
dsv3-mini        1024 12 1 16  - 384  512 128/64/128 2816  256  32/4/1  4/2 32000
dsv2-mini        1024 12 1 16  - none 512 128/64/128 2816  256  32/4/1  4/2 32000
glm-4.5          5120 92 3 96  8 - - 128 12288 1536 160/8/1 1/1 151552
qwen3-235b-a22b  4096 94 0 64  4 - - 128 - 1536 128/8/0 1/1 151936
qwen3-30b-a3b    2048 48 0 32  4 - - 128 - 768  128/8/0 1/1 151936
llama-3.1-8b     4096 32 - 32  8 - - 128 14336 - - - 128256
llama-3.1-70b    8192 80 - 64  8 - - 128 28672 - - - 128256
"""


def row_of(config: ModelConfig) -> list[str]:
    attention, moe = config.attention, config.moe
    if isinstance(attention, MLA):
        rank = "none" if attention.q_lora_rank is None else str(attention.q_lora_rank)
        dims = f"{attention.qk_nope_head_dim}/{attention.qk_rope_head_dim}/{attention.v_head_dim}"
        parts = ["-", rank, str(attention.kv_lora_rank), dims]
    else:
        parts = [str(attention.num_key_value_heads), "-", "-", str(attention.head_dim)]
    routing = ["-", "-", "-"]
    if moe is not None:
        experts = f"{moe.n_routed_experts}/{moe.num_experts_per_tok}/{moe.n_shared_experts}"
        routing = [str(moe.moe_intermediate_size), experts, f"{moe.n_group}/{moe.topk_group}"]
    return [
        str(config.hidden_size),
        str(config.num_hidden_layers),
        "-" if moe is None else str(moe.first_k_dense_replace),
        str(config.num_attention_heads),
        *parts,
        str(config.intermediate_size or "-"),
        *routing,
        str(config.vocab_size),
    ]


def test_presets_are_the_rows_of_the_table() -> None:
    rows = {line.split()[0]: line.split()[1:] for line in TABLE.strip().splitlines()}
    assert {name: row_of(preset(name)) for name in PRESETS} == rows


def test_preset_names_ignore_case_and_an_unknown_one_lists_the_others() -> None:
    assert preset("DeepSeek-V3") == preset("deepseek-v3")
    assert load_model_config("deepseek-v3") == preset("deepseek-v3")
    with pytest.raises(ConfigError, match=r"'gpt-5' is neither a folder with a config\.json.* presets: deep"):
        load_model_config("gpt-5")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model_config("no/such/folder")


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("qwen2", {"sliding_window": 8}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [None, 8, 8, 8]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, [None] * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [8] * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, [None] * 4),
        ("llama", {}, [None] * 4),
    ],
)
def test_the_window_of_each_layer(family: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    config = read_config(raw_config(family, num_hidden_layers=4, **changes))
    assert [config.sliding_window(layer) for layer in range(4)] == windows
    ignored = family == "qwen3_moe" and "max_window_layers" in changes
    assert any("max_window_layers is not used" in note for note in config.notes) == ignored


@pytest.mark.parametrize(
    ("family", "changes", "moe_layers"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 3]),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, [1, 2]),
        ("deepseek_v3", {"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2]),
        ("deepseek_v2", {"first_k_dense_replace": 4}, []),
    ],
)
def test_the_layers_with_experts(family: str, changes: dict[str, Any], moe_layers: list[int]) -> None:
    config = read_config(raw_config(family, num_hidden_layers=4, **changes))
    assert [layer for layer in range(4) if config.is_moe_layer(layer)] == moe_layers


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "linear", "factor": 2.0}, 8192),
        ({"type": "dynamic", "factor": 8.0}, 32768),
        (LLAMA3 | {"type": "llama3"}, 4096),
    ],
)
def test_largest_position_by_rope_type(rope: dict[str, Any], positions: int) -> None:
    scaling = {"rope_scaling": rope} if rope else {}
    assert most_positions(read_config(raw_config("llama", **scaling))) == positions


def test_prompts_that_are_rotated_alike() -> None:
    """Only where the rotation depends on the length, and only beyond the model's own positions."""
    plain = read_config(raw_config("llama"))
    assert {cache_salt(plain, length) for length in (1, 4096, 9999)} == {b""}
    dynamic = read_config(raw_config("llama", rope_scaling={"type": "dynamic", "factor": 4.0}))
    assert {cache_salt(dynamic, length) for length in (1, 4096)} == {b""}
    assert len({cache_salt(dynamic, length) for length in (1, 5000, 5001)}) == 3
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    longrope = {"type": "longrope", "original_max_position_embeddings": 1024, **factors}
    long = read_config(raw_config("llama", rope_scaling=longrope))
    assert cache_salt(long, 1024) == b"" and cache_salt(long, 1025) == cache_salt(long, 3000) != b""
