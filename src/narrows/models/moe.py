"""The stages of a layer with routed experts, the same in every family that has them: router, shared_expert, experts.

Not which rank sees which rows.

Letters: T rows, H hidden_size, E experts, K num_experts_per_tok, F intermediate columns held here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from narrows.arch.config import ModelConfig
from narrows.models.decoder import DecoderLayer, Loader, StepInputs
from narrows.ops.experts import SharedMlp, experts_mlp
from narrows.ops.route import Routing, route, router, router_logits

__all__ = ["MoeLayer"]


class MoeLayer(DecoderLayer):
    """A decoder layer that may have routed experts; the config says which have an MLP instead."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__(config, load, layer)
        weights = self.weights
        self.moe = config.moe if config.is_moe_layer(layer) else None
        self.adds_shared = False
        if self.moe is None:
            return
        self.gate_EH = load.gate(weights["gate"])
        bias = weights.get("gate.e_score_correction_bias")
        self.rule: dict[str, Any] = {
            "top_k": self.moe.num_experts_per_tok,
            "scoring": self.moe.scoring_func,
            "method": self.moe.topk_method,
            "num_groups": self.moe.n_group,
            "topk_group": self.moe.topk_group,
            "norm_topk_prob": self.moe.norm_topk_prob,
            "routed_scaling_factor": self.moe.routed_scaling_factor,
            "correction_bias_E": load(bias) if bias else None,
        }
        self.experts_gate_up_EF2H, self.experts_down_EHF, self.first_expert = load.experts(weights)
        if self.moe.n_shared_experts:
            self.shared_gate_up_F2H = load.gate_up(weights, "shared_experts.gate_proj", "shared_experts.up_proj")
            self.shared_down_HF = load.linear(weights, "shared_experts.down_proj")
            self.adds_shared = load.rank_context.sharding.shared_expert == "sharded"
            self.shared: SharedMlp = self.shared_gate_up_F2H, self.shared_down_HF
            if config.mlp_bias:
                names = "shared_experts.gate_proj.bias", "shared_experts.up_proj.bias"
                down_bias_H = load.if_held(weights["shared_experts.down_proj.bias"])
                self.shared = *self.shared[:2], load.stacked(weights, *names), down_bias_H

    def route(self, hidden_TH: Tensor, forced_ids_TK: Tensor | None = None, *, with_margin: bool = False) -> Routing:
        """Each row's experts and their weights. The reference multiplies in float32, so this does.

        ``forced_ids_TK`` replays a choice made elsewhere; the weights are still this run's.
        """
        logits_TE = router_logits(hidden_TH, self.gate_EH, batch_invariant=self.rank_context.batch_invariant)
        return route(logits_TE, **self.rule, forced_ids_TK=forced_ids_TK, with_margin=with_margin)

    def router(self, step: StepInputs, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(topk_ids int32, topk_weights float32), as they travel."""
        return router(hidden_TH, self.gate_EH, **self.rule, batch_invariant=self.rank_context.batch_invariant)

    def shared_expert(self, step: StepInputs, hidden_TH: Tensor) -> Tensor:
        """The shared experts' MLP over the columns this rank holds (all of them, where they are replicated)."""
        return self.gated_mlp(hidden_TH, *self.shared)

    def experts(
        self,
        step: StepInputs,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """The routed experts held here, and the shared ones where they are sharded: an addend of the world's sum."""
        return experts_mlp(
            hidden_TH,
            topk_ids_TK,
            topk_weights_TK,
            self.experts_gate_up_EF2H,
            self.experts_down_EHF,
            first_expert=self.first_expert,
            shared=self.shared if self.adds_shared else None,
            hidden_act=self.config.hidden_act,
            out=out,
            batch_invariant=self.rank_context.batch_invariant,
        )
