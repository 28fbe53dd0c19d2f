"""DeepSeek V2 and V3, and Kimi-K2, which is a V3 of other numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from narrows.arch.configs.needs import ExpertCount, Experts, Factor, Flag, LayerCount, Layers, Positions, Text, Width
from narrows.arch.configs.rope import Head
from narrows.arch.configs.routing import routed_experts
from narrows.arch.configs.schema import Only, Schema
from narrows.arch.configs.shown import shown
from narrows.arch.model import MLA, MoE
from narrows.errors import CheckpointError

__all__ = ["DeepseekV2", "DeepseekV3"]

_HARMLESS = {
    "num_key_value_heads": "every head has its own keys and values, made from one latent",
    "head_dim": "the class sets it to qk_rope_head_dim",
    "qk_head_dim": "the class sets it to qk_nope_head_dim + qk_rope_head_dim",
}


class _Latent(Schema):
    """Multi-head latent attention and routed experts."""

    intermediate_size: Width | None = None
    q_lora_rank: Width | None
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width
    attention_bias: Flag = False
    n_routed_experts: Experts
    num_experts_per_tok: Experts
    moe_intermediate_size: Width
    first_k_dense_replace: LayerCount
    moe_layer_freq: Layers = 1
    num_nextn_predict_layers: LayerCount = 0
    norm_topk_prob: Flag | None
    scoring_func: Text | None
    topk_method: Text | None

    def attention(self) -> MLA:
        return MLA(
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            attention_bias=self.attention_bias,
        )

    def is_interleaved(self) -> bool:
        return True

    def head(self) -> Head:
        return Head(
            head_dim=self.qk_rope_head_dim,
            max_position_embeddings=self.max_position_embeddings,
            interleaved=self.is_interleaved(),
            latent=True,
        )

    def dense_size(self, moe: MoE | None) -> int:
        assert moe is not None
        if self.intermediate_size is None and not all(map(moe.in_layer, range(self.num_hidden_layers))):
            raise CheckpointError("the field 'intermediate_size' is missing, and there are layers without experts")
        return self.intermediate_size or 0

    def notes(self) -> tuple[str, ...]:
        num_mtp = self.num_nextn_predict_layers
        if not num_mtp:
            return ()
        return (f"{num_mtp} multi-token-prediction layer(s) of the checkpoint are skipped: narrows predicts one token",)


class DeepseekV2(_Latent):
    """``DeepseekV2Config``. Scores are by softmax; weights are scaled and never normalised."""

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_v2",)
    class_names: ClassVar[tuple[str, ...]] = ("DeepseekV2",)
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({"num_experts": "n_routed_experts"})
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {"rope_interleave": Only(True, "DeepSeek V2 rotates neighbouring columns")}
    )
    harmless: ClassVar[Mapping[str, str]] = MappingProxyType(_HARMLESS)

    max_position_embeddings: Positions = 2048
    mlp_bias: Flag = False
    first_k_dense_replace: LayerCount = 0
    n_group: Experts | None = None
    topk_group: Experts | None = None
    n_shared_experts: ExpertCount = 2
    routed_scaling_factor: Factor = 1.0
    norm_topk_prob: Flag | None = False
    scoring_func: Text | None = "softmax"
    topk_method: Text | None = "greedy"

    def has_mlp_bias(self) -> bool:
        return self.mlp_bias

    def moe(self) -> MoE:
        return routed_experts(
            self,
            scoring_func=self.scoring_func or "softmax",
            topk_method=self.topk_method or "greedy",
            norm_topk_prob=False,
            moe_layer_freq=self.moe_layer_freq,
        )

    def notes(self) -> tuple[str, ...]:
        notes = super().notes()
        if self.norm_topk_prob:
            notes += ("norm_topk_prob is not used: as in transformers, DeepSeek V2 never normalises experts' weights",)
        if self.scoring_func not in (None, "softmax"):
            notes += _obeyed("scoring_func", self.scoring_func, "softmax")
        return notes


class DeepseekV3(_Latent):
    """``DeepseekV3Config``. Scores are by sigmoid, the choice by groups and a correction bias, unless the file says
    otherwise: DeepSeek's own code obeys ``scoring_func`` and ``topk_method``, transformers does not read them."""

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_v3", "kimi_k2")
    class_names: ClassVar[tuple[str, ...]] = ("DeepseekV3", "KimiK2")
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    )
    only: ClassVar[Mapping[str, Only]] = MappingProxyType({"mlp_bias": Only(False, "DeepSeek V3's MLP has no bias")})
    harmless: ClassVar[Mapping[str, str]] = MappingProxyType(_HARMLESS)

    max_position_embeddings: Positions = 4096
    rope_interleave: Flag | None = True
    first_k_dense_replace: LayerCount = 3
    n_group: Experts | None = 8
    topk_group: Experts | None = 4
    n_shared_experts: ExpertCount = 1
    routed_scaling_factor: Factor = 2.5
    norm_topk_prob: Flag | None = True
    scoring_func: Text | None = "sigmoid"
    topk_method: Text | None = "noaux_tc"

    def is_interleaved(self) -> bool:
        return bool(self.rope_interleave)

    def moe(self) -> MoE:
        return routed_experts(
            self,
            scoring_func=self.scoring_func or "sigmoid",
            topk_method=self.topk_method or "noaux_tc",
            norm_topk_prob=bool(self.norm_topk_prob),
            moe_layer_freq=self.moe_layer_freq,
        )

    def notes(self) -> tuple[str, ...]:
        notes = super().notes()
        if self.scoring_func not in (None, "sigmoid"):
            notes += _obeyed("scoring_func", self.scoring_func, "sigmoid")
        if self.topk_method not in (None, "noaux_tc"):
            notes += _obeyed("topk_method", self.topk_method, "noaux_tc")
        return notes


def _obeyed(field: str, value: str | None, usual: str) -> tuple[str]:
    given, other = shown(value), shown(usual)
    return (f"{field} {given} is obeyed, as in DeepSeek's own code; transformers takes {other} whatever it says",)
