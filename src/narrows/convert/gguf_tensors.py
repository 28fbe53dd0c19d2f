"""Which tensor of a GGUF file is which of Hugging Face's, and in which order its rows lie. Knows names and shapes.

llama.cpp rotates pairs of NEIGHBOURING rows of q and k, Hugging Face the two HALVES of a head, so llama.cpp's converter
reorders the rows of q and k of the llama architecture; `row_order` undoes that. Rows are reordered while still
quantised: a block never spans rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from narrows.convert.gguf_config import ROPE_FACTORS, Family, Sizes, gguf_family, gguf_sizes
from narrows.convert.gguf_header import GgufHeader
from narrows.errors import CheckpointError, ConfigError

__all__ = ["Target", "gguf_targets", "row_order"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a GGUF tensor goes: its name and shape, and for reordered rows the number of heads."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def gguf_targets(file: GgufHeader) -> dict[str, Target]:
    """The target of each tensor by its GGUF name, checked against the file: none missing, none unknown, shapes right.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the metadata implies.
        ConfigError: an architecture that is not known here, or a tensor that its models do not have.
    """
    family = gguf_family(file)
    targets = dict(_targets(family, gguf_sizes(file)))
    if "output.weight" not in file.tensors:
        del targets["output.weight"]
    if missing := [name for name in targets if name not in file.tensors]:
        raise CheckpointError(f"{file.path} lacks {len(missing)} of {len(targets)} tensors, first {missing[0]}")
    if unknown := [name for name in file.tensors if name not in targets and name != ROPE_FACTORS]:
        raise ConfigError(
            f"{file.path} has {len(unknown)} tensors that a {family.hf_class} does not, first {unknown[0]}; "
            f"supported: dense models with biases on {', '.join(family.biases) or 'nothing'}"
        )
    for name, to in targets.items():
        if (shape := file.tensors[name].shape) != to.shape:
            raise CheckpointError(f"{file.path}: {name} is {shape}, but the metadata makes it {to.shape}")
    return targets


def row_order(to: Target) -> np.ndarray:
    """For each row of Hugging Face's tensor, its row in the file."""
    rows = np.arange(to.shape[0])
    if to.heads is None:
        return rows
    half = to.shape[0] // to.heads // 2
    return rows.reshape(to.heads, half, 2).swapaxes(1, 2).reshape(-1)


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
