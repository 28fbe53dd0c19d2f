"""Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP, in the order of the forward pass.

How these families differ is in the config: biases, windows, norms of each query and key head. Sources of the
numbers: transformers' ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``.

Letters: T rows, H hidden_size, N this rank's query heads, K its key-value heads, D head_dim, S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.arch.config import GQA, ModelConfig
from narrows.arch.weight_sharding import head_spans, kv_head_spans
from narrows.models.decoder import Decoder, DecoderLayer, Loader, StepInputs
from narrows.ops.gqa_attention import gqa_attention
from narrows.ops.paged import empty_cache
from narrows.ops.rope_cache import rope_write_heads

__all__ = ["Llama", "LlamaLayer"]


class LlamaLayer(DecoderLayer):
    """input_norm, attention (which norms each query and key head where the model does), post_attn_norm, mlp."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__(config, load, layer)
        rank_context, gqa = load.rank_context, config.attention
        assert isinstance(gqa, GQA)
        tp_index = rank_context.rank % rank_context.mesh.group_size
        q_lo, q_hi = head_spans(config, rank_context.mesh.group_size)[tp_index]
        kv_lo, kv_hi = kv_head_spans(config, rank_context.mesh.group_size)[tp_index]
        per_group = config.num_attention_heads // gqa.num_key_value_heads
        self.num_heads, self.num_kv_heads, self.head_dim = q_hi - q_lo, kv_hi - kv_lo, gqa.head_dim
        self.kv_index = tuple(head // per_group - kv_lo for head in range(q_lo, q_hi))
        self.scale = gqa.head_dim**-0.5
        self.window = config.sliding_window(layer)
        self.qkv_proj = load.linear(self.weights, "q_proj", "k_proj", "v_proj")
        self.qkv_bias: Tensor | None = None
        if gqa.qkv_bias:
            self.qkv_bias = load.stacked(self.weights, "q_proj.bias", "k_proj.bias", "v_proj.bias")
        self.q_norm_D = load(self.weights["q_norm"]) if gqa.qk_norm else None
        self.k_norm_D = load(self.weights["k_norm"]) if gqa.qk_norm else None
        self.o_proj = load.linear(self.weights, "o_proj")
        self.o_bias_H: Tensor | None = None
        if gqa.o_bias:
            self.o_bias_H = load.if_held(self.weights["o_proj.bias"])
        cache = (rank_context.num_slots, self.num_kv_heads, gqa.head_dim)
        self.k_cache_SKD = empty_cache(cache, rank_context.dtype, rank_context.device)
        self.v_cache_SKD = empty_cache(cache, rank_context.dtype, rank_context.device)

    def attention(self, step: StepInputs, hidden_TH: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Projections, rotary embedding, softmax over the paged cache, output projection of this rank's heads."""
        num_q, num_kv, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qkv_TC = self.linear(hidden_TH, self.qkv_proj, self.qkv_bias)
        qkv_TND = torch.unflatten(qkv_TC, -1, (num_q + 2 * num_kv, dim))
        q_TND = rope_write_heads(
            qkv_TND,
            step.cos_TD2,
            step.sin_TD2,
            self.k_cache_SKD,
            self.v_cache_SKD,
            step.rows.slots_T,
            q_norm_D=self.q_norm_D,
            k_norm_D=self.k_norm_D,
            eps=self.eps,
        )
        rows = step.rows if self.window is None else step.windowed[self.window]
        attended = gqa_attention(q_TND, self.k_cache_SKD, self.v_cache_SKD, rows, self.kv_index, self.scale)
        return self.linear(attended, self.o_proj, self.o_bias_H, out=out)


class Llama(Decoder):
    """A Llama on one rank; families that differ in their layers name another ``layer_class``."""

    layer_class: type[LlamaLayer] = LlamaLayer

    def __init__(self, config: ModelConfig, load: Loader) -> None:
        assert isinstance(config.attention, GQA)
        rotated = int(config.attention.head_dim * config.rope.partial_rotary_factor)
        super().__init__(config, load, rope_dim=rotated)
        self.layers = [self.layer_class(config, load, layer) for layer in range(config.num_hidden_layers)]
