"""Models by name, so that `narrows plan` needs no checkpoint: the dimensions in their public configs.

Only what prices need is exact here (dimensions, layer counts, routing). Tokens and rope are the defaults of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from narrows.arch.block_formats import BlockFormat, StoredBlocks, block_format
from narrows.arch.config import ModelConfig, read_config
from narrows.checkpoints import built_in, local_model, name_of
from narrows.convert.gguf_config import gguf_config
from narrows.convert.gguf_header import GgufHeader, find_gguf
from narrows.convert.gguf_keys import gguf_notes
from narrows.convert.gguf_tensors import Target, gguf_targets
from narrows.errors import ConfigError

__all__ = ["PRESETS", "load_model_config", "preset"]


_IN_PRODUCTS = tuple(
    f"{name}.weight"
    for name in (
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
        *("gate_proj", "up_proj", "down_proj", "lm_head"),
    )
)
"""Endings of the names of weights that only rows are multiplied with."""


def _deepseek(version: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": f"deepseek_v{version}",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    } | fields


_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
"""As DeepSeek-V3, R1 and Kimi-K2 were published; the others are bfloat16."""
_DEEPSEEK_V3 = _deepseek(
    3,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    vocab_size=129280,
    num_nextn_predict_layers=1,
    rope_scaling=_YARN,
    quantization_config=_FP8,
)
_DEEPSEEK_MINI = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
}
_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
_LLAMA31 = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek-v2": _deepseek(
            2,
            hidden_size=5120,
            num_hidden_layers=60,
            num_attention_heads=128,
            q_lora_rank=1536,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            n_routed_experts=160,
            num_experts_per_tok=6,
            n_shared_experts=2,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
            vocab_size=102400,
            rope_scaling=_YARN,
        ),
        "deepseek-v2-lite": _deepseek(
            2,
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            q_lora_rank=None,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            first_k_dense_replace=1,
            vocab_size=102400,
            rope_scaling=_YARN,
        ),
        "deepseek-v3": _DEEPSEEK_V3,
        "deepseek-r1": _DEEPSEEK_V3,
        "kimi-k2": _DEEPSEEK_V3
        | {
            "num_attention_heads": 64,
            "n_routed_experts": 384,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "vocab_size": 163840,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 131072,
        },
        # No published models: small ones of these shapes, for benchmarks with random weights (docs/benchmarks.md).
        "dsv3-mini": _deepseek(
            3, **_DEEPSEEK_MINI, q_lora_rank=384, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc"
        ),
        "dsv2-mini": _deepseek(
            2, **_DEEPSEEK_MINI, q_lora_rank=None, scoring_func="softmax", topk_method="group_limited_greedy"
        ),
        "glm-4.5": {
            "model_type": "glm4_moe",
            "hidden_size": 5120,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "vocab_size": 151552,
            "max_position_embeddings": 131072,
            "num_nextn_predict_layers": 1,
        },
        "qwen3-235b-a22b": _QWEN3_MOE
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
        },
        "qwen3-30b-a3b": _QWEN3_MOE
        | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768},
        "llama-3.1-8b": _LLAMA31
        | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        "llama-3.1-70b": _LLAMA31
        | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    }
)


def preset(name: str) -> ModelConfig:
    """The preset called ``name`` (any case).

    Raises:
        ConfigError: no such preset; the known names are listed.
    """
    raw = PRESETS.get(name.lower())
    if raw is None:
        raise ConfigError(
            f"{name!r} is neither a folder with a config.json, nor a .gguf file, nor org/name of the hub, nor a preset"
            f"; built in: {', '.join(built_in()) or 'none'}; presets: {', '.join(PRESETS)}"
        )
    return read_config(raw, name.lower())


def load_model_config(model: str, revision: str = "") -> ModelConfig:
    """The model named on a command line: a checkpoint folder or a built-in one's name, a ``config.json``, a ``.gguf``
    file, a name of the hub (``org/name``, whose ``config.json`` alone is fetched), or a preset name."""
    model = local_model(model, revision=revision, needed="config")
    path = Path(model)
    if (file := find_gguf(path)) is not None:
        return _read_gguf(file)
    if path.exists() or "/" in model or model.endswith(".json"):
        return read_config(path, name_of(path) if path.is_dir() else "")
    return preset(model)


def _read_gguf(file: Path) -> ModelConfig:
    """The model of a GGUF file whose metadata and tensors agree: so every size is backed by the file."""
    header = GgufHeader(file)
    raw = gguf_config(header)
    targets = gguf_targets(header, raw)
    config = read_config(raw, header.path.stem)
    return replace(config, blocks=_blocks(header, targets), notes=(*config.notes, *gguf_notes(header)))


def _blocks(header: GgufHeader, targets: Mapping[str, Target]) -> StoredBlocks:
    """The weights of products that the file holds in blocks which are multiplied as they are."""
    found: dict[str, BlockFormat] = {}
    in_products = _IN_PRODUCTS if "lm_head.weight" in targets else (*_IN_PRODUCTS, "embed_tokens.weight")
    for name, target in targets.items():
        if name.endswith(in_products) and isinstance(target.source, str):
            known = block_format(header.tensors[target.source].encoding)
            if known is not None:
                found[name] = known
    return StoredBlocks.of((name, known) for name, known in found.items() if _is_whole(name, found))


def _is_whole(name: str, found: Mapping[str, BlockFormat]) -> bool:
    """Whether of an expert's three weights, which one call multiplies, all are in blocks, its gate as its up."""
    if "{expert}" not in name:
        return True
    gate, up, down = (found.get(f"{name.rsplit('.', 2)[0]}.{part}_proj.weight") for part in ("gate", "up", "down"))
    return gate is not None and gate == up and down is not None
