"""Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

from narrows.arch.configs.gqa import PLAIN_HALVES, GroupedQuery
from narrows.arch.configs.needs import Experts, Flag, Heads, Layer, LayerCount, Layers, Needs, Positions, Text, Width
from narrows.arch.configs.routing import check_routing
from narrows.arch.configs.schema import Only
from narrows.arch.configs.shown import shown
from narrows.arch.model import GQA, MoE
from narrows.errors import CheckpointError, ConfigError

__all__ = ["Qwen2", "Qwen3", "Qwen3Moe"]

_SLIDING = "sliding_attention"
_KINDS = {"full_attention": False, "attention": False, _SLIDING: True}
_NO_MLP_BIAS = Only(False, "Qwen's MLP has no bias")
_NORMS = Only(True, "Qwen3 norms queries and keys")


class _Windowed(GroupedQuery):
    """Windows as Qwen has them: off unless ``use_sliding_window``, and then in the layers from ``max_window_layers`` on
    or in those that ``layer_types`` names."""

    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Positions = 32768
    use_sliding_window: Flag = False
    sliding_window: Positions | None = 4096
    max_window_layers: LayerCount = 28
    layer_types: Annotated[list[Text], Needs("a list of texts")] | None = None

    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def sliding(self) -> tuple[int, ...]:
        """The layers with a window, if there is one."""
        if self.layer_types is None:
            return tuple(range(self.max_window_layers, self.num_hidden_layers))
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}"
            )
        for kind in self.layer_types:
            if kind not in _KINDS:
                raise ConfigError(f"layer_types names {shown(kind)}; full_attention and sliding_attention are computed")
        layers = tuple(layer for layer, kind in enumerate(self.layer_types) if _KINDS[kind])
        if layers and self.window() is None:
            raise CheckpointError(
                f"layer_types names sliding_attention for {len(layers)} layers, but use_sliding_window is "
                f"{shown(self.use_sliding_window)} and sliding_window {shown(self.sliding_window)}: there is no window"
            )
        return layers


class Qwen2(_Windowed):
    """``Qwen2Config``: biases of q, k and v, always."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    class_names: ClassVar[tuple[str, ...]] = ("Qwen2",)
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {
            **PLAIN_HALVES,
            "attention_bias": Only(True, "Qwen2 has biases of q, k and v, and none of o"),
            "qkv_bias": Only(True, "Qwen2 has biases of q, k and v"),
            "mlp_bias": _NO_MLP_BIAS,
        }
    )

    def attention(self) -> GQA:
        return self.grouped(qkv_bias=True, window=self.window(), sliding=self.sliding())


class Qwen3(_Windowed):
    """``Qwen3Config``: norms of queries and keys; ``attention_bias`` is a bias of q, k, v and o."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)
    class_names: ClassVar[tuple[str, ...]] = ("Qwen3",)
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {**PLAIN_HALVES, "mlp_bias": _NO_MLP_BIAS, "use_qk_norm": _NORMS, "qk_norm": _NORMS}
    )

    head_dim: Width = 128
    attention_bias: Flag = False

    def attention(self) -> GQA:
        bias = self.attention_bias
        return self.grouped(qkv_bias=bias, o_bias=bias, qk_norm=True, window=self.window(), sliding=self.sliding())


class Qwen3Moe(GroupedQuery):
    """``Qwen3MoeConfig``: softmax over all experts, the best few of them; every layer slides or none does."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_moe",)
    class_names: ClassVar[tuple[str, ...]] = ("Qwen3Moe",)
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({"num_local_experts": "num_experts"})
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {
            **PLAIN_HALVES,
            "mlp_bias": _NO_MLP_BIAS,
            "use_qk_norm": _NORMS,
            "qk_norm": _NORMS,
            "n_shared_experts": Only(0, "Qwen3-MoE has no shared experts"),
            "scoring_func": Only("softmax", "Qwen3-MoE routes by softmax"),
            "topk_method": Only("greedy", "Qwen3-MoE takes the best experts of all"),
            "n_group": Only(1, "Qwen3-MoE takes the best experts of all"),
            "topk_group": Only(1, "Qwen3-MoE takes the best experts of all"),
            "routed_scaling_factor": Only(1, "Qwen3-MoE does not scale its experts"),
            "first_k_dense_replace": Only(0, "mlp_only_layers names Qwen3-MoE's dense layers"),
            "moe_layer_freq": Only(1, "decoder_sparse_step is Qwen3-MoE's"),
        }
    )

    intermediate_size: Width | None = None  # type: ignore[assignment]
    num_key_value_heads: Heads = 4
    max_position_embeddings: Positions = 32768
    attention_bias: Flag = False
    use_sliding_window: Flag = False
    sliding_window: Positions | None = 4096
    max_window_layers: LayerCount | None = None
    num_experts: Experts
    num_experts_per_tok: Experts
    moe_intermediate_size: Width
    norm_topk_prob: Flag = False
    decoder_sparse_step: Layers = 1
    mlp_only_layers: Annotated[list[Layer], Needs("a list of layers' indices, from 0")] | None = None

    def dense_size(self, moe: MoE | None) -> int:
        assert moe is not None
        if self.intermediate_size is None and not all(map(moe.in_layer, range(self.num_hidden_layers))):
            raise CheckpointError("the field 'intermediate_size' is missing, and there are layers without experts")
        return self.intermediate_size or 0

    def attention(self) -> GQA:
        bias = self.attention_bias
        window = self.sliding_window if self.use_sliding_window else None
        return self.grouped(
            qkv_bias=bias, o_bias=bias, qk_norm=True, window=window, sliding=range(self.num_hidden_layers)
        )

    def notes(self) -> tuple[str, ...]:
        if not self.use_sliding_window or self.sliding_window is None or self.max_window_layers is None:
            return ()
        return ("max_window_layers is not used: as in transformers, every layer of a Qwen3-MoE slides or none does",)

    def moe(self) -> MoE:
        return check_routing(
            MoE(
                n_routed_experts=self.num_experts,
                num_experts_per_tok=self.num_experts_per_tok,
                moe_intermediate_size=self.moe_intermediate_size,
                n_shared_experts=0,
                first_k_dense_replace=0,
                scoring_func="softmax",
                topk_method="greedy",
                n_group=1,
                topk_group=1,
                norm_topk_prob=self.norm_topk_prob,
                routed_scaling_factor=1.0,
                decoder_sparse_step=self.decoder_sparse_step,
                mlp_only_layers=frozenset(self.mlp_only_layers or ()),
            ),
            experts_field="num_experts",
        )
