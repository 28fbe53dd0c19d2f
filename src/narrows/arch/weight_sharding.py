"""Which weights each rank holds: the ways to shard embedding, projections and experts, and the units they split by.

Weight sharding is chosen once per deployment, because it decides what is loaded; layouts are chosen per step. Weights
are split in whole units: attention heads, groups of key-value heads, experts, blocks of columns. Where units do not
divide the ranks, the first ranks get one more. Where there are fewer units than ranks, the error proposes meshes that
work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import gcd, lcm

from narrows.arch.config import GQA, MLA, ModelConfig
from narrows.errors import ConfigError
from narrows.layout import Mesh, Span, split_evenly, starts

__all__ = [
    "DENSE_DOWN",
    "EXPERT_DOWN",
    "SHARED_DOWN",
    "WeightSharding",
    "check_mesh",
    "head_spans",
    "kv_head_spans",
    "sharding_choices",
    "sharding_words",
    "split_blocks",
    "split_columns",
]

_BLOCKS = (128, 64, 32, 16, 8, 4, 2, 1)
DENSE_DOWN, SHARED_DOWN = ".mlp.down_proj.weight", ".shared_experts.down_proj.weight"
EXPERT_DOWN = ".experts.{expert}.down_proj.weight"
"""Endings of the names of weights whose inputs are split over the world."""
_OUT = ".o_proj.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSharding:
    """Which weights a rank holds. The defaults are those of the published layouts."""

    embed: str = "vocab"
    """``vocab``: rows of the vocabulary sharded over the world, leaves an owed sum; ``replicated``: a row stage."""
    qkv_a_proj: str = "replicated"
    """``replicated``: a row stage; ``column``: columns sharded over the attention group, gathered after."""
    shared_expert: str = "sharded"
    """``sharded``: split over the world beside the experts; ``replicated``: a row stage whose output is joined."""
    experts: str = "split"
    """``split``: every expert's intermediate size split over the world; ``whole``: each rank has whole experts."""

    def __str__(self) -> str:
        return (
            f"embed {self.embed}, qkv_a_proj {self.qkv_a_proj}, "
            f"shared expert {self.shared_expert}, experts {self.experts}"
        )


def sharding_words(config: ModelConfig, sharding: WeightSharding) -> str:
    """``sharding`` in words, without those of parts that this model does not have."""
    words = [f"embed {sharding.embed}"]
    if isinstance(config.attention, MLA):
        words.append(f"qkv_a_proj {sharding.qkv_a_proj}")
    if config.moe is not None:
        if config.moe.n_shared_experts:
            words.append(f"shared expert {sharding.shared_expert}")
        words.append(f"experts {sharding.experts}")
    return ", ".join(words)


def sharding_choices(config: ModelConfig, mesh: Mesh) -> tuple[WeightSharding, ...]:
    """Every distinct weight sharding of this model on this mesh, the published one first."""
    one_rank, one_in_group = mesh.size == 1, mesh.group_size == 1
    moe = config.moe
    embed = ("vocab",) if one_rank else ("vocab", "replicated")
    low_rank = isinstance(config.attention, MLA) and not one_in_group
    qkv_a = ("replicated", "column") if low_rank else ("replicated",)
    shared = ("sharded", "replicated") if moe and moe.n_shared_experts and not one_rank else ("sharded",)
    experts = ("split", "whole") if moe and not one_rank and moe.n_routed_experts >= mesh.size else ("split",)
    return tuple(
        WeightSharding(embed=e, qkv_a_proj=q, shared_expert=s, experts=x)
        for e, q, s, x in product(embed, qkv_a, shared, experts)
    )


def split_blocks(columns: int, parts: int) -> tuple[Span, ...]:
    """Spans of ``columns`` for each part, in the largest blocks that do not make the largest share larger.

    >>> split_blocks(1408, 8)[0], split_blocks(18432, 8)[7]       # in blocks of 16, and of 128
    ((0, 176), (16128, 18432))
    >>> split_blocks(1536, 5)
    ((0, 308), (308, 616), (616, 924), (924, 1232), (1232, 1536))
    """
    best: tuple[Span, ...] = ()
    for block in _BLOCKS:
        if columns % block == 0:
            spans = starts(tuple(n * block for n in split_evenly(columns // block, parts)))
            if not best or spans[0][1] < best[0][1]:
                best = spans
    return best


def split_columns(config: ModelConfig, ending: str, columns: int, parts: int) -> tuple[Span, ...]:
    """As :func:`split_blocks`, in whole blocks of the weights whose names end so and whose inputs these columns are."""
    together = config.blocks.columns_together(ending)
    if together == 1:
        return split_blocks(columns, parts)
    assert columns % together == 0, f"{columns} columns in blocks of {together}"
    return tuple((lo * together, hi * together) for lo, hi in starts(split_evenly(columns // together, parts)))


def head_spans(config: ModelConfig, tp: int) -> tuple[Span, ...]:
    """The query heads of each rank of an attention group of ``tp`` ranks.

    Key-value groups stay whole on a rank while there are at least as many as ranks. Heads whose columns share a block
    of ``o_proj`` stay together.
    """
    attention, heads, together = config.attention, config.num_attention_heads, _heads_together(config)
    if isinstance(attention, GQA):
        whole = lcm(heads // attention.num_key_value_heads, together)
        together = whole if heads // whole >= tp else together
    return starts(tuple(n * together for n in split_evenly(heads // together, tp)))


def _heads_together(config: ModelConfig) -> int:
    """Heads that no split may part."""
    attention, block = config.attention, config.blocks.columns_together(_OUT)
    columns = attention.head_dim if isinstance(attention, GQA) else attention.v_head_dim
    return block // gcd(block, columns)


def kv_head_spans(config: ModelConfig, tp: int) -> tuple[Span, ...]:
    """The key-value heads that each rank of a group needs for its query heads; ranks may hold the same ones (GQA)."""
    attention = config.attention
    assert isinstance(attention, GQA)
    per_group = config.num_attention_heads // attention.num_key_value_heads
    return tuple((lo // per_group, -(-hi // per_group)) for lo, hi in head_spans(config, tp))


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh that the model's whole units cannot be split over.

    Raises:
        ConfigError: with the numbers, and meshes of the same size that work.
    """
    heads, tp, together = config.num_attention_heads, mesh.group_size, _heads_together(config)
    if tp > heads // together:
        if together > 1:
            raise ConfigError(
                f"tp {tp}: o_proj is stored in blocks that {together} of the {heads} attention heads of {config.name} "
                f"share, and a block is not split; use tp {heads // together} at most, or --quantization none"
            )
        works = [f"dp {mesh.size // t} x tp {t}" for t in range(heads, 0, -1) if mesh.size % t == 0]
        raise ConfigError(
            f"tp {tp} is larger than the {heads} attention heads of {config.name}, and a head is not split; "
            f"on {mesh.size} ranks these work: {', '.join(works[:4])}"
        )
    sizes = {"vocab_size": (config.vocab_size, "")}
    is_moe = {config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)}
    if False in is_moe:
        sizes["intermediate_size"] = config.intermediate_size, DENSE_DOWN
    if config.moe is not None and True in is_moe:
        sizes["moe_intermediate_size"] = config.moe.moe_intermediate_size, EXPERT_DOWN
        if config.moe.n_shared_experts:
            sizes["the shared experts' size"] = config.moe.shared_intermediate_size, SHARED_DOWN
    for name, (size, ending) in sizes.items():
        block = config.blocks.columns_together(ending) if ending else 1
        if mesh.size > size // block:
            stored = f", which is stored in blocks of {block}," if block > 1 else ""
            other = ", or --quantization none" if block > 1 else ""
            raise ConfigError(
                f"{mesh} has {mesh.size} ranks, more than {name} {size} of {config.name}{stored} can be split into; "
                f"use at most {size // block} ranks{other}"
            )
