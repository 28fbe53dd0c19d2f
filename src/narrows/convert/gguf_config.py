"""A GGUF file's metadata as the fields of ``config.json`` and ``generation_config.json``. Knows architectures of
llama.cpp, opens no tensor but the small one of rotary factors. Pure Python.

llama.cpp writes Llama 3's rotary scaling as a tensor of factors by frequency (``rope_freqs.weight``), without the
numbers that made them. Every published Llama 3 has the same three (`LLAMA3`), and the fourth is the largest factor; so
the factors are made again from these, compared, and refused if they differ.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from narrows.convert.gguf_header import GgufHeader
from narrows.errors import CheckpointError, ConfigError

__all__ = [
    "FAMILIES",
    "ROPE_FACTORS",
    "Family",
    "Sizes",
    "gguf_config",
    "gguf_family",
    "gguf_generation_config",
    "gguf_sizes",
    "is_gguf",
    "special_token_ids",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes an architecture of GGUF (``general.architecture``, which is also Hugging Face's model_type).

    ``rows_reordered``: llama.cpp's converter reorders the rows of q and k. ``biases``: the projections with a bias.
    ``config``: constant fields of ``config.json``.
    """

    hf_class: str
    rows_reordered: bool
    biases: tuple[str, ...]
    config: Mapping[str, Any]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            hf_class="LlamaForCausalLM",
            rows_reordered=True,
            biases=(),
            config={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        ),
        "qwen2": Family(
            hf_class="Qwen2ForCausalLM",
            rows_reordered=False,
            biases=("q", "k", "v"),
            config={"use_sliding_window": False},
        ),
    }
)
"""The architectures that narrows reads from GGUF."""

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = MappingProxyType({"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
ROLES = MappingProxyType({"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"})  # ours -> GGUF's word
SAMPLING = MappingProxyType(  # generation_config.json's field -> GGUF's key
    {
        "temperature": "general.sampling.temp",
        "top_k": "general.sampling.top_k",
        "top_p": "general.sampling.top_p",
        "min_p": "general.sampling.min_p",
        "repetition_penalty": "general.sampling.penalty_repeat",
    }
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a model that shape its tensors."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def is_gguf(path: Path) -> bool:
    """Whether a model's path names a GGUF file: by its ending, so that a missing file is called what it should be."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def gguf_family(file: GgufHeader) -> Family:
    """The architecture; `ConfigError` names those that are known."""
    name = file.need("general.architecture", str)
    if name not in FAMILIES:
        raise ConfigError(f"{file.path} is of the architecture {name!r}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def gguf_sizes(file: GgufHeader) -> Sizes:
    """The sizes, from metadata and the embedding's rows; refuses what the families here do not have."""
    prefix = file.need("general.architecture", str)
    hidden, heads = _count(file, f"{prefix}.embedding_length"), file.need(f"{prefix}.attention.head_count", object)
    kv_heads = file.get(f"{prefix}.attention.head_count_kv", object, heads)
    if not all(isinstance(count, int) and count > 0 for count in (heads, kv_heads)) or heads % kv_heads:
        raise ConfigError(
            f"{file.path} has {heads} attention heads and {kv_heads} key-value heads; "
            "supported: one number for all layers, the first a multiple of the second"
        )
    head_dim = file.get(f"{prefix}.attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := file.get(f"{prefix}.{key}", int, head_dim)) != head_dim:
            raise ConfigError(f"{file.path} has {prefix}.{key} {found} but heads of {head_dim}; supported: equal ones")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight; fetch a complete file")
    vocab = file.tensors["token_embd.weight"].shape[0]
    if (num_tokens := len(file.need("tokenizer.ggml.tokens", list[str]))) > vocab:
        raise CheckpointError(f"{file.path} has {num_tokens} tokens but embeddings for {vocab}")
    return Sizes(
        vocab=vocab,
        hidden=hidden,
        inner=_count(file, f"{prefix}.feed_forward_length"),
        layers=_count(file, f"{prefix}.block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def gguf_config(file: GgufHeader, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The fields of ``config.json``, for weights kept as ``dtype``.

    Raises:
        ConfigError: an architecture, or a variant of one, that is not known here; the message names what is.
        CheckpointError: metadata that is missing or contradicts itself.
    """
    family, sizes = gguf_family(file), gguf_sizes(file)
    prefix = file.need("general.architecture", str)
    ids = special_token_ids(file)
    theta = _shortest(file.get(f"{prefix}.rope.freq_base", float, 10000.0))
    return {
        "architectures": [family.hf_class],
        "model_type": prefix,
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _count(file, f"{prefix}.context_length"),
        "rms_norm_eps": _shortest(file.need(f"{prefix}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, prefix, theta, sizes.head_dim),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": dtype,
        **family.config,
        **{f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids},
    }


def gguf_generation_config(file: GgufHeader) -> dict[str, Any]:
    """The fields of ``generation_config.json``: ids, and the sampling that the file recommends, if it does.

    A chat's end of turn, where the file names one, ends a text as eos does.
    """
    ids: dict[str, Any] = dict(special_token_ids(file))
    ends = [ids.get("eos"), file.get("tokenizer.ggml.eot_token_id", int)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if len(ends) > 1:
        ids["eos"] = ends
    config = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    sampling = {field: file.get(key, int if field == "top_k" else float) for field, key in SAMPLING.items()}
    sampling = {k: _shortest(v) if isinstance(v, float) else v for k, v in sampling.items() if v is not None}
    return {**config, **({"do_sample": True} if sampling else {}), **sampling}


def special_token_ids(file: GgufHeader) -> dict[str, int]:
    """Ids of the roles that the file names, of ``bos``, ``eos``, ``unk`` and ``pad``."""
    found = {role: file.get(f"tokenizer.ggml.{word}_token_id", int) for role, word in ROLES.items()}
    num_tokens = len(file.need("tokenizer.ggml.tokens", list[str]))
    for role, token in found.items():
        if token is not None and not 0 <= token < num_tokens:
            raise CheckpointError(f"{file.path}: {role} token id {token} is outside the {num_tokens} tokens")
    return {role: token for role, token in found.items() if token is not None}


def _count(file: GgufHeader, key: str) -> int:
    value: int = file.need(key, int)
    if value < 1:
        raise CheckpointError(f"{file.path}: {key} is {value}; it must be at least 1")
    return value


def _rope_scaling(file: GgufHeader, prefix: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = file.get(f"{prefix}.rope.scaling.type", str, "none")
    if kind != "none" or file.get(f"{prefix}.rope.scale_linear", object) is not None:
        raise ConfigError(
            f"{file.path} scales its rotary positions ({kind!r}); supported: no scaling, or Llama 3's by tensor"
        )
    if ROPE_FACTORS not in file.tensors:
        return None
    found = file.floats(ROPE_FACTORS)
    if found and all(factor == 1.0 for factor in found):
        return None
    scaling = {"rope_type": "llama3", "factor": max(found, default=0.0), **LLAMA3}
    made = _llama3_factors(scaling, theta, head_dim)
    if len(found) != len(made) or not all(math.isclose(f, m, rel_tol=1e-4) for f, m in zip(found, made, strict=True)):
        raise ConfigError(
            f"{file.path} scales its rotary positions by {len(found)} factors up to {max(found, default=0.0):g} "
            f"({ROPE_FACTORS}) that are not Llama 3's rule for heads of {head_dim}; supported: none, or Llama 3's"
        )
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """What each frequency is divided by, as llama.cpp's converter computes it from ``config.json``."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (i / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept) if factor else math.inf)
    return factors


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    single = struct.pack("<f", value)
    return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == single)
