"""DeepSeek V2 and V3 (and Kimi-K2): multi-head latent attention and routed experts, in the order of the forward pass.

Sources of the numbers: DeepSeek-V2 (2405.04434, section 2.1), DeepSeek-V3 (2412.19437), and transformers'
``DeepseekV2ForCausalLM`` and ``DeepseekV3ForCausalLM``.

Letters: T rows, H hidden_size, N this rank's heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, V v_head_dim,
S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.arch.config import MLA, ModelConfig
from narrows.models.decoder import Decoder, Loader, StepInputs
from narrows.models.moe import MoeLayer
from narrows.ops.kv_b import split_kv_b
from narrows.ops.mla_attention import mla_attention
from narrows.ops.paged import empty_cache
from narrows.ops.rms_norm import latent_norm
from narrows.ops.rope import mla_softmax_scale
from narrows.ops.rope_cache import rope_write_latents

__all__ = ["Deepseek", "DeepseekLayer"]

LATENT_EPS = 1e-6
"""The norms of the latents keep RMSNorm's default epsilon whatever ``rms_norm_eps`` says, as the reference does."""


class DeepseekLayer(MoeLayer):
    """input_norm, qkv_a_proj, latent_norm, attention, post_attn_norm, then mlp or router, shared_expert, experts."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__(config, load, layer)
        weights, mla = self.weights, config.attention
        assert isinstance(mla, MLA)
        self.mla = mla
        self.q_rank = mla.q_lora_rank or 0
        low_rank = ("q_a_proj", "kv_a_proj_with_mqa") if self.q_rank else ("kv_a_proj_with_mqa",)
        self.qkv_a_CH = load.linear(weights, *low_rank)
        self.qkv_a_bias_C: Tensor | None = None
        self.o_bias_H: Tensor | None = None
        if mla.attention_bias:
            self.qkv_a_bias_C = load.stacked(weights, *(f"{name}.bias" for name in low_rank))
            self.o_bias_H = load.if_held(weights["o_proj.bias"])
        self.q_a_layernorm = load(weights["q_a_layernorm"]) if self.q_rank else None
        self.kv_a_layernorm_R = load(weights["kv_a_layernorm"])
        self.q_proj = load.linear(weights, "q_b_proj" if self.q_rank else "q_proj")
        kv_b_NXR = torch.unflatten(load(weights["kv_b_proj"]), 0, (-1, mla.qk_nope_head_dim + mla.v_head_dim))
        self.w_uk_NDR, self.w_uv_NVR = split_kv_b(kv_b_NXR, mla.qk_nope_head_dim, load.room)
        self.o_proj = load.linear(weights, "o_proj")
        self.scale = mla_softmax_scale(mla.qk_head_dim, config.rope.as_mapping())
        rank_context = load.rank_context
        self.cache_SC = empty_cache((rank_context.num_slots, mla.latent_dim), rank_context.dtype, rank_context.device)

    def qkv_a_proj(self, step: StepInputs, hidden_TH: Tensor) -> Tensor:
        """Queries' latent, keys' and values' latent, and the shared rotary key, side by side (this rank's columns)."""
        return self.linear(hidden_TH, self.qkv_a_CH, self.qkv_a_bias_C)

    def latent_norm(self, step: StepInputs, latent_TC: Tensor) -> Tensor:
        """RMSNorm of the queries' latent and of the keys' and values' latent, each alone; the rotary key as it is."""
        return latent_norm(latent_TC, self.q_a_layernorm, self.kv_a_layernorm_R, LATENT_EPS)

    def attention(self, step: StepInputs, *inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of this rank's heads over the paged latents, and the output projection: an addend.

        ``inputs`` is the normed latent; without ``q_lora_rank``, hidden first and then the latent.
        """
        latent_TC = inputs[-1]
        mla, q = self.mla, self.q_rank
        query_from = latent_TC[:, :q] if q else inputs[0]
        q_TND = torch.unflatten(self.linear(query_from, self.q_proj), -1, (-1, mla.qk_head_dim))
        q_nope_TND, q_pe_TNP = torch.split(q_TND, [mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        rope_write_latents(
            q_pe_TNP,
            latent_TC[:, q:],
            step.cos_TD2,
            step.sin_TD2,
            self.cache_SC,
            step.rows.slots_T,
            interleaved=self.config.rope.interleaved,
        )
        attended = mla_attention(
            q_nope_TND,
            q_pe_TNP,
            self.cache_SC,
            step.rows,
            self.w_uk_NDR,
            self.w_uv_NVR,
            self.scale,
            batch_invariant=self.rank_context.batch_invariant,
        )
        return self.linear(attended, self.o_proj, self.o_bias_H, out=out)


class Deepseek(Decoder):
    """A DeepSeek V2 or V3 on one rank."""

    def __init__(self, config: ModelConfig, load: Loader) -> None:
        assert isinstance(config.attention, MLA)
        # The reference rotates V2 in float32 and V3 in the model's dtype.
        rope_dtype = torch.float32 if config.model_type == "deepseek_v2" else None
        super().__init__(config, load, rope_dim=config.attention.qk_rope_head_dim, rope_dtype=rope_dtype)
        self.layers = [DeepseekLayer(config, load, layer) for layer in range(config.num_hidden_layers)]
