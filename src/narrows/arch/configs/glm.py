"""GLM-4.5 and 4.6."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from narrows.arch.configs.gqa import PLAIN_HALVES, GroupedQuery
from narrows.arch.configs.needs import Epsilon, ExpertCount, Experts, Factor, Flag, Heads, LayerCount, Positions, Width
from narrows.arch.configs.rope import Head
from narrows.arch.configs.routing import routed_experts
from narrows.arch.configs.schema import Only
from narrows.arch.model import GQA, MoE

__all__ = ["Glm4Moe"]


class Glm4Moe(GroupedQuery):
    """``Glm4MoeConfig``: half of each head is rotated; experts are chosen as DeepSeek V3 chooses them.

    ``attention_bias`` is a bias of q, k and v.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm4_moe",)
    class_names: ClassVar[tuple[str, ...]] = ("Glm4Moe",)
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    )
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {
            **PLAIN_HALVES,
            "mlp_bias": Only(False, "GLM's MLP has no bias"),
            "scoring_func": Only("sigmoid", "GLM-4.5 scores by sigmoid"),
            "topk_method": Only("noaux_tc", "GLM-4.5 chooses by groups and a correction bias"),
            "moe_layer_freq": Only(1, "every layer after the dense ones has experts"),
        }
    )

    num_key_value_heads: Heads = 8
    max_position_embeddings: Positions = 131072
    rms_norm_eps: Epsilon = 1e-5
    attention_bias: Flag = False
    use_qk_norm: Flag = False
    n_routed_experts: Experts
    num_experts_per_tok: Experts
    moe_intermediate_size: Width
    n_shared_experts: ExpertCount = 1
    first_k_dense_replace: LayerCount = 1
    n_group: Experts = 1
    topk_group: Experts = 1
    norm_topk_prob: Flag = True
    routed_scaling_factor: Factor = 1.0
    num_nextn_predict_layers: LayerCount = 0

    def head(self) -> Head:
        return Head(head_dim=self.columns(), max_position_embeddings=self.max_position_embeddings, partial=0.5)

    def attention(self) -> GQA:
        return self.grouped(qkv_bias=self.attention_bias, qk_norm=self.use_qk_norm)

    def moe(self) -> MoE:
        return routed_experts(self, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=self.norm_topk_prob)
