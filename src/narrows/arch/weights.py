"""The slices of checkpoint tensors that each rank holds, for the price of memory and for the loader.

Names are those of the checkpoint (Hugging Face's). A slice is a span along one dimension, whole experts, or everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from narrows.arch.block_formats import BlockFormat
from narrows.arch.config import GQA, MLA, ModelConfig
from narrows.arch.weight_sharding import (
    DENSE_DOWN,
    EXPERT_DOWN,
    SHARED_DOWN,
    WeightSharding,
    head_spans,
    kv_head_spans,
    split_blocks,
    split_columns,
)
from narrows.layout import Mesh, Span, split_evenly, starts

__all__ = ["Weight", "embed_weights", "head_weights", "layer_weights"]

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the checkpoint (or one per expert, ``{expert}`` in its name), and each rank's slice of it.

    ``spans`` along ``dim`` are per rank of the attention group, or per rank of the world if ``over_world``; without
    ``dim`` every rank takes it whole. ``experts`` are the experts each rank of the world takes. ``quantized``: stored
    with one byte per value and block scales in an FP8 checkpoint. ``float32``: held in float32 whatever else runs.
    ``blocks``: held in blocks of this format. ``once_in``: held by the first rank of each ``group`` or of the ``world``
    alone, because it is an addend of a sum over those ranks. ``stored_as``: names under which a checkpoint may hold it,
    of which the first that is there counts; none: ``name``.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    spans: tuple[Span, ...] = ()
    over_world: bool = False
    experts: tuple[Span, ...] = ()
    quantized: bool = False
    float32: bool = False
    blocks: BlockFormat | None = None
    once_in: Literal["", "group", "world"] = ""
    stored_as: tuple[str, ...] = ()

    @property
    def int8(self) -> bool:
        """Whether int8 rounds it: the weights of FP8 checkpoints, less ``kv_b_proj``, which attention multiplies."""
        return self.quantized and not self.name.endswith(".kv_b_proj.weight")

    def span(self, mesh: Mesh, rank: int) -> Span | None:
        """The rank's span along ``dim``; None when it takes the whole tensor."""
        if self.dim is None:
            return None
        return self.spans[rank if self.over_world else rank % mesh.group_size]

    def num_experts(self, rank: int) -> int:
        """Number of tensors of this name that the rank takes: 1, or one per expert."""
        if not self.experts:
            return 1
        start, stop = self.experts[rank]
        return stop - start

    def is_held(self, mesh: Mesh, rank: int) -> bool:
        """Whether the rank has any of it: not of an addend that another rank adds to the sum."""
        return not self.once_in or rank % (mesh.group_size if self.once_in == "group" else mesh.size) == 0

    def local_shape(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """Shape of the rank's slice, of one expert where there are several."""
        span = self.span(mesh, rank)
        if span is None:
            return self.shape
        return tuple(span[1] - span[0] if dim == self.dim else size for dim, size in enumerate(self.shape))

    def num_values(self, mesh: Mesh, rank: int) -> int:
        """Number of values the rank holds."""
        if not self.is_held(mesh, rank):
            return 0
        return prod(self.local_shape(mesh, rank)) * self.num_experts(rank)


def _scaled(spans: tuple[Span, ...], unit: int) -> tuple[Span, ...]:
    return tuple((lo * unit, hi * unit) for lo, hi in spans)


def embed_weights(config: ModelConfig, mesh: Mesh, sharding: WeightSharding) -> dict[str, Weight]:
    """The input embedding, ``[vocab_size, hidden_size]``."""
    shape = (config.vocab_size, config.hidden_size)
    names = (_EMBED, _HEAD) if config.tie_word_embeddings else ()
    if sharding.embed == "replicated":
        return _in_blocks(config, {"embed_tokens": Weight(name=_EMBED, shape=shape, stored_as=names)})
    spans = split_blocks(config.vocab_size, mesh.size)
    embed = Weight(name=_EMBED, shape=shape, dim=0, spans=spans, over_world=True, stored_as=names)
    return _in_blocks(config, {"embed_tokens": embed})


def head_weights(config: ModelConfig, mesh: Mesh) -> dict[str, Weight]:
    """The final norm and the LM head, whose vocabulary is sharded over the world. Tied heads name the embedding."""
    name, names = (_EMBED, (_EMBED, _HEAD)) if config.tie_word_embeddings else (_HEAD, ())
    spans = split_blocks(config.vocab_size, mesh.size)
    shape = (config.vocab_size, config.hidden_size)
    weights = {
        "norm": Weight(name="model.norm.weight", shape=(config.hidden_size,)),
        "lm_head": Weight(name=name, shape=shape, dim=0, spans=spans, over_world=True, stored_as=names),
    }
    return _in_blocks(config, weights)


def layer_weights(config: ModelConfig, mesh: Mesh, sharding: WeightSharding, layer: int) -> dict[str, Weight]:
    """Every tensor of one decoder layer by its role, the checkpoint's name less the layer's prefix and ``.weight``."""
    prefix = f"model.layers.{layer}."
    norm = (config.hidden_size,)
    weights = {
        "input_layernorm": Weight(name=prefix + "input_layernorm.weight", shape=norm),
        "post_attention_layernorm": Weight(name=prefix + "post_attention_layernorm.weight", shape=norm),
    }
    attention = prefix + "self_attn."
    if isinstance(config.attention, MLA):
        weights |= _mla_weights(config, config.attention, mesh, sharding, attention)
    else:
        weights |= _gqa_weights(config, config.attention, mesh, attention)
    if config.is_moe_layer(layer):
        return _in_blocks(config, weights | _moe_weights(config, mesh, sharding, prefix + "mlp."))
    spans = split_columns(config, DENSE_DOWN, config.intermediate_size, mesh.size)
    mlp = _mlp_weights(config.hidden_size, config.intermediate_size, spans, prefix + "mlp.", config.mlp_bias)
    return _in_blocks(config, weights | mlp)


def _in_blocks(config: ModelConfig, weights: dict[str, Weight]) -> dict[str, Weight]:
    """The same, those that are held in blocks marked."""
    if not config.blocks:
        return weights
    return {role: replace(weight, blocks=config.blocks.of_name(weight.name)) for role, weight in weights.items()}


def _mla_weights(config: ModelConfig, mla: MLA, mesh: Mesh, sharding: WeightSharding, prefix: str) -> dict[str, Weight]:
    hidden, tp = config.hidden_size, mesh.group_size
    heads = head_spans(config, tp)
    q_rank, kv_rank = mla.q_lora_rank, mla.kv_lora_rank

    def low_rank(name: str, rows: int, at: int) -> Weight:
        """One part of the fused low-rank projection, whose output columns start at ``at`` of the fused ones."""
        shape = (rows, hidden)
        if sharding.qkv_a_proj == "replicated":
            return Weight(name=f"{prefix}{name}.weight", shape=shape, quantized=True)
        cut = starts(split_evenly(mla.qkv_latent_dim, tp))
        spans = tuple((min(max(lo - at, 0), rows), min(max(hi - at, 0), rows)) for lo, hi in cut)
        return Weight(name=f"{prefix}{name}.weight", shape=shape, dim=0, spans=spans, quantized=True)

    def bias(of: Weight) -> Weight:
        """As many numbers as ``of`` has rows, cut as those are."""
        name = of.name.removesuffix("weight") + "bias"
        return Weight(name=name, shape=of.shape[:1], dim=of.dim, spans=of.spans)

    def by_head(name: str, per_head: int, k: int) -> Weight:
        shape = (config.num_attention_heads * per_head, k)
        spans = _scaled(heads, per_head)
        return Weight(name=f"{prefix}{name}.weight", shape=shape, dim=0, spans=spans, quantized=True)

    weights: dict[str, Weight] = {}
    if q_rank is None:
        weights["q_proj"] = by_head("q_proj", mla.qk_head_dim, hidden)
    else:
        weights["q_a_proj"] = low_rank("q_a_proj", q_rank, 0)
        weights["q_a_layernorm"] = Weight(name=prefix + "q_a_layernorm.weight", shape=(q_rank,))
        weights["q_b_proj"] = by_head("q_b_proj", mla.qk_head_dim, q_rank)
    weights["kv_a_proj_with_mqa"] = low_rank("kv_a_proj_with_mqa", mla.latent_dim, q_rank or 0)
    weights["kv_a_layernorm"] = Weight(name=prefix + "kv_a_layernorm.weight", shape=(kv_rank,))
    weights["kv_b_proj"] = by_head("kv_b_proj", mla.qk_nope_head_dim + mla.v_head_dim, kv_rank)
    weights["o_proj"] = Weight(
        name=prefix + "o_proj.weight",
        shape=(hidden, config.num_attention_heads * mla.v_head_dim),
        dim=1,
        spans=_scaled(heads, mla.v_head_dim),
        quantized=True,
    )
    if mla.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa"):
            if name in weights:
                weights[f"{name}.bias"] = bias(weights[name])
        weights["o_proj.bias"] = Weight(name=prefix + "o_proj.bias", shape=(hidden,), once_in="group")
    return weights


def _gqa_weights(config: ModelConfig, gqa: GQA, mesh: Mesh, prefix: str) -> dict[str, Weight]:
    hidden, tp, dim = config.hidden_size, mesh.group_size, gqa.head_dim
    q_spans = _scaled(head_spans(config, tp), dim)
    kv_spans = _scaled(kv_head_spans(config, tp), dim)
    q_rows, kv_rows = config.num_attention_heads * dim, gqa.num_key_value_heads * dim
    weights: dict[str, Weight] = {}
    for name, rows, spans in (
        ("q_proj", q_rows, q_spans),
        ("k_proj", kv_rows, kv_spans),
        ("v_proj", kv_rows, kv_spans),
    ):
        weights[name] = Weight(name=f"{prefix}{name}.weight", shape=(rows, hidden), dim=0, spans=spans, quantized=True)
        if gqa.qkv_bias:
            weights[f"{name}.bias"] = Weight(name=f"{prefix}{name}.bias", shape=(rows,), dim=0, spans=spans)
    if gqa.qk_norm:
        weights["q_norm"] = Weight(name=prefix + "q_norm.weight", shape=(dim,))
        weights["k_norm"] = Weight(name=prefix + "k_norm.weight", shape=(dim,))
    weights["o_proj"] = Weight(
        name=prefix + "o_proj.weight", shape=(hidden, q_rows), dim=1, spans=q_spans, quantized=True
    )
    if gqa.o_bias:
        weights["o_proj.bias"] = Weight(name=prefix + "o_proj.bias", shape=(hidden,), once_in="group")
    return weights


def _mlp_weights(
    hidden: int, intermediate: int, spans: tuple[Span, ...], prefix: str, bias: bool = False
) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name in ("gate_proj", "up_proj"):
        weights[name] = Weight(
            name=f"{prefix}{name}.weight",
            shape=(intermediate, hidden),
            dim=0,
            spans=spans,
            over_world=True,
            quantized=True,
        )
        if bias:
            weights[f"{name}.bias"] = Weight(
                name=f"{prefix}{name}.bias", shape=(intermediate,), dim=0, spans=spans, over_world=True
            )
    weights["down_proj"] = Weight(
        name=f"{prefix}down_proj.weight",
        shape=(hidden, intermediate),
        dim=1,
        spans=spans,
        over_world=True,
        quantized=True,
    )
    if bias:
        weights["down_proj.bias"] = Weight(name=f"{prefix}down_proj.bias", shape=(hidden,), once_in="world")
    return weights


def _moe_weights(config: ModelConfig, mesh: Mesh, sharding: WeightSharding, prefix: str) -> dict[str, Weight]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    num_experts, size = moe.n_routed_experts, moe.moe_intermediate_size
    weights = {"gate": Weight(name=prefix + "gate.weight", shape=(num_experts, hidden), float32=True)}
    if moe.topk_method == "noaux_tc":
        weights["gate.e_score_correction_bias"] = Weight(
            name=prefix + "gate.e_score_correction_bias", shape=(num_experts,), float32=True
        )
    whole = sharding.experts == "whole"
    held = starts(split_evenly(num_experts, mesh.size)) if whole else ((0, num_experts),) * mesh.size
    spans = split_columns(config, EXPERT_DOWN, size, mesh.size)
    for name, shape, dim in (
        ("gate_proj", (size, hidden), 0),
        ("up_proj", (size, hidden), 0),
        ("down_proj", (hidden, size), 1),
    ):
        weights[f"experts.{name}"] = Weight(
            name=f"{prefix}experts.{{expert}}.{name}.weight",
            shape=shape,
            dim=None if whole else dim,
            spans=() if whole else spans,
            over_world=True,
            experts=held,
            quantized=True,
        )
    if moe.n_shared_experts:
        replicated = sharding.shared_expert == "replicated"
        size = moe.shared_intermediate_size
        spans = split_columns(config, SHARED_DOWN, size, 1 if replicated else mesh.size)
        shared = _mlp_weights(hidden, size, spans, prefix + "shared_experts.", config.mlp_bias)
        for role, weight in shared.items():
            whole_copy = Weight(name=weight.name, shape=weight.shape, quantized=weight.quantized)
            weights[f"shared_experts.{role}"] = whole_copy if replicated else weight
    return weights
