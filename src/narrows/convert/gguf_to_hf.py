"""Converts a GGUF file to a Hugging Face folder. Knows llama.cpp's tensor names and row order, not how a model runs.

    GGUF                              folder
    metadata                          config.json, generation_config.json
    tokenizer.ggml.*                  tokenizer.json, tokenizer_config.json
    tensors, quantised                model.safetensors, dequantised

llama.cpp rotates pairs of NEIGHBOURING rows of q and k, Hugging Face the two HALVES of a head, so llama.cpp's converter
reorders the rows of q and k of the llama architecture; here that is undone. Rows are reordered while still quantised:
a block never spans rows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import quants
from gguf.gguf_reader import ReaderTensor

from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_tokenizer import special_token_ids, tokenizer_backend, write_tokenizer
from narrows.convert.safetensors_stream import TensorEntry, check_dtype, write_safetensors
from narrows.errors import CheckpointError, ConfigError

__all__ = ["FAMILIES", "Family", "convert_gguf"]

PIECE = 1 << 22  # values dequantised at once: 16 MiB in float32


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
"""The architectures that `convert_gguf` knows."""


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


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a GGUF tensor goes: its name and shape, and for reordered rows the number of heads."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def convert_gguf(source: Path, target: Path, *, dtype: str = "bfloat16") -> Path:
    """Write the Hugging Face folder ``target`` from the GGUF file ``source``, and return ``target``.

    Weights are dequantised, then rounded to ``dtype`` (bfloat16, float16, float32). The folder appears whole or not at
    all: it is written beside ``target`` under another name and renamed at the end. Raises `ConfigError` for what cannot
    be converted (naming what can), and `CheckpointError` for a file that is cut off or contradicts itself.
    """
    source, target = Path(source), Path(target)
    check_dtype(dtype)
    _refuse_existing(target)
    file = GgufFile(source)
    family = _family(file)
    sizes = _sizes(file)
    tokenizer_backend(file)  # refuse a tokenizer before the long part
    config = _config(file, family, sizes, dtype)
    entries = _entries(file, family, sizes)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        _write_json(part / "config.json", config)
        _write_json(part / "generation_config.json", _generation_config(file))
        write_tokenizer(file, part, max_length=config["max_position_embeddings"])
        write_safetensors(part / "model.safetensors", entries, dtype=dtype)
        _refuse_existing(target)  # another process may have been faster
        part.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}; name another target folder") from error
    finally:
        rmtree(part, ignore_errors=True)  # nothing to remove when all went well
    return target


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it, or name another target folder")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# -- metadata ---------------------------------------------------------------------------------------------------------


def _family(file: GgufFile) -> Family:
    name = file.need("general.architecture")
    if name not in FAMILIES:
        raise ConfigError(f"{file.path} is of the architecture {name!r}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def _sizes(file: GgufFile) -> Sizes:
    """The sizes, from metadata and the embedding's rows; refuses what the families here do not have."""
    prefix = file.need("general.architecture")
    hidden, heads = file.need(f"{prefix}.embedding_length"), file.need(f"{prefix}.attention.head_count")
    kv_heads = file.get(f"{prefix}.attention.head_count_kv", heads)
    if not all(isinstance(count, int) and count > 0 for count in (heads, kv_heads)) or heads % kv_heads:
        raise ConfigError(
            f"{file.path} has {heads} attention heads and {kv_heads} key-value heads; "
            "supported: one number for all layers, the first a multiple of the second"
        )
    head_dim = file.get(f"{prefix}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := file.get(f"{prefix}.{key}", head_dim)) != head_dim:
            raise ConfigError(f"{file.path} has {prefix}.{key} {found} but heads of {head_dim}; supported: equal ones")
    scaling = file.get(f"{prefix}.rope.scaling.type", "none")
    linear = file.get(f"{prefix}.rope.scale_linear")
    if scaling != "none" or linear is not None or "rope_freqs.weight" in file.tensors:
        raise ConfigError(f"{file.path} scales its rotary positions ({scaling!r} or by tensor); supported: none")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight; fetch a complete file")
    vocab = int(file.tensors["token_embd.weight"].shape[-1])
    if (num_tokens := len(file.need("tokenizer.ggml.tokens"))) > vocab:
        raise CheckpointError(f"{file.path} has {num_tokens} tokens but embeddings for {vocab}")
    return Sizes(
        vocab=vocab,
        hidden=hidden,
        inner=file.need(f"{prefix}.feed_forward_length"),
        layers=file.need(f"{prefix}.block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def _config(file: GgufFile, family: Family, sizes: Sizes, dtype: str) -> dict[str, Any]:
    prefix = file.need("general.architecture")
    ids = special_token_ids(file)
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
        "max_position_embeddings": file.need(f"{prefix}.context_length"),
        "rms_norm_eps": _shortest(file.need(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.get(f"{prefix}.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": dtype,
        **family.config,
        **{f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids},
    }


def _generation_config(file: GgufFile) -> dict[str, Any]:
    """Ids for generation; a chat's end of turn, where the file names one, ends a text as eos does."""
    ids: dict[str, Any] = special_token_ids(file)
    ends = [ids.get("eos"), file.get("tokenizer.ggml.eot_token_id")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if len(ends) > 1:
        ids["eos"] = ends
    return {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# -- tensors ----------------------------------------------------------------------------------------------------------


def _targets(family: Family, sizes: Sizes) -> Iterator[tuple[str, Target]]:
    """Every tensor of a model by its GGUF name; ``output.weight`` last, as it may be absent (tied)."""
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    q_heads, k_heads = (sizes.heads, sizes.kv_heads) if family.rows_reordered else (None, None)
    yield "token_embd.weight", Target(name="model.embed_tokens.weight", shape=(sizes.vocab, sizes.hidden))
    projections = {
        "q": Target(name="self_attn.q_proj", shape=(q, sizes.hidden), heads=q_heads),
        "k": Target(name="self_attn.k_proj", shape=(kv, sizes.hidden), heads=k_heads),
        "v": Target(name="self_attn.v_proj", shape=(kv, sizes.hidden)),
        "output": Target(name="self_attn.o_proj", shape=(sizes.hidden, q)),
    }
    inward, outward = (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)
    feed_forward = {"gate": inward, "up": inward, "down": outward}
    for i in range(sizes.layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        yield f"{block}.attn_norm.weight", Target(name=f"{layer}.input_layernorm.weight", shape=(sizes.hidden,))
        for key, to in projections.items():
            name = f"{layer}.{to.name}"
            yield f"{block}.attn_{key}.weight", Target(name=f"{name}.weight", shape=to.shape, heads=to.heads)
            if key in family.biases:
                yield f"{block}.attn_{key}.bias", Target(name=f"{name}.bias", shape=to.shape[:1], heads=to.heads)
        yield f"{block}.ffn_norm.weight", Target(name=f"{layer}.post_attention_layernorm.weight", shape=(sizes.hidden,))
        for key, shape in feed_forward.items():
            yield f"{block}.ffn_{key}.weight", Target(name=f"{layer}.mlp.{key}_proj.weight", shape=shape)
    yield "output_norm.weight", Target(name="model.norm.weight", shape=(sizes.hidden,))
    yield "output.weight", Target(name="lm_head.weight", shape=(sizes.vocab, sizes.hidden))


def _entries(file: GgufFile, family: Family, sizes: Sizes) -> list[TensorEntry]:
    """The tensors to write, each checked against the file: none missing, none unknown, shapes and encodings right."""
    targets = dict(_targets(family, sizes))
    if "output.weight" not in file.tensors:
        del targets["output.weight"]
    if missing := [name for name in targets if name not in file.tensors]:
        raise CheckpointError(f"{file.path} lacks {len(missing)} of {len(targets)} tensors, first {missing[0]}")
    if unknown := [name for name in file.tensors if name not in targets]:
        raise ConfigError(
            f"{file.path} has {len(unknown)} tensors that a {family.hf_class} does not, first {unknown[0]}; "
            f"supported: dense models with biases on {', '.join(family.biases) or 'nothing'}"
        )
    for name, to in targets.items():
        tensor = file.tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != to.shape:
            raise CheckpointError(f"{file.path}: {name} is {shape}, but the metadata makes it {to.shape}")
        if not _can_dequantise(tensor):
            raise ConfigError(f"{file.path}: {name} is encoded as {tensor.tensor_type.name}, which gguf cannot decode")
    return [
        TensorEntry(name=to.name, shape=to.shape, pieces=partial(_pieces, file.tensors[name], to))
        for name, to in targets.items()
    ]


def _can_dequantise(tensor: ReaderTensor) -> bool:
    try:
        quants.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _pieces(tensor: ReaderTensor, to: Target) -> Iterator[np.ndarray]:
    """Float32 values of ``tensor``, some rows at a time, in Hugging Face's row order."""
    order = np.arange(to.shape[0]) if to.heads is None else _hf_row_order(to.shape[0], to.heads)
    if len(to.shape) == 1:
        yield quants.dequantize(tensor.data, tensor.tensor_type)[order]
        return
    step = max(1, PIECE // to.shape[1])
    for start in range(0, to.shape[0], step):
        yield quants.dequantize(tensor.data[order[start : start + step]], tensor.tensor_type)


def _hf_row_order(num_rows: int, heads: int) -> np.ndarray:
    """For each row of Hugging Face's q or k, its row in GGUF: there, rows i and i + half of a head are neighbours."""
    half = num_rows // heads // 2
    return np.arange(num_rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)
