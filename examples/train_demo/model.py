"""The architecture of narrows-demo in transformers, and a form of its experts that trains fast on a CPU.

Knows transformers' DeepseekV3. Knows nothing of data or the training loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from vocabulary import SIZE

BALANCE_RATE = 1e-2
"""By how much a step at the peak learning rate moves an expert's selection bias towards equal load (DeepSeek-V3,
section 2.1.2, with 1e-3 for a run a thousand times as long); it falls with the learning rate."""


def build() -> DeepseekV3ForCausalLM:
    """The model with fresh weights."""
    config = DeepseekV3Config(
        vocab_size=SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        intermediate_size=640,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=64,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=True,
    )
    model = DeepseekV3ForCausalLM(config)
    ALL_EXPERTS_FUNCTIONS.register("all_rows", _all_rows)
    model.set_experts_implementation("all_rows")
    for experts in _experts(model):
        experts.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)
    return model


def balance(model: DeepseekV3ForCausalLM, rate: float) -> float:
    """Moves every router's selection bias by ``rate`` times the sign of its experts' lack of load.

    Returns the worst expert's load over the mean.
    """
    worst = 0.0
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        load = layer.mlp.experts.load
        layer.mlp.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        worst = max(worst, float(load.max() / load.mean()))
        load.zero_()
    return worst


def _experts(model: DeepseekV3ForCausalLM) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers[model.config.first_k_dense_replace :]]


def _all_rows(self: nn.Module, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Every expert over every row, weighted by 0 where it was not chosen.

    Four times the products of the chosen ones alone, but as two large products without an index, so that torch.compile
    makes one graph of the whole model.
    """
    num_experts, double_columns, hidden = self.gate_up_proj.shape
    rows = x_TH.shape[0]
    weight_TE = torch.zeros(rows, num_experts, dtype=topk_weights_TK.dtype).scatter(1, topk_ids_TK, topk_weights_TK)
    with torch.no_grad():
        self.load += (weight_TE > 0).sum(0)
    gate_up = functional.linear(x_TH, self.gate_up_proj.reshape(-1, hidden))
    gate_up_TE2F = gate_up.view(rows, num_experts, 2, double_columns // 2)
    inner_TEF = (
        functional.silu(gate_up_TE2F[:, :, 0]) * gate_up_TE2F[:, :, 1] * weight_TE.unsqueeze(-1).to(gate_up.dtype)
    )
    return functional.linear(inner_TEF.flatten(1), self.down_proj.permute(1, 0, 2).reshape(hidden, -1)).to(x_TH.dtype)
