"""Fields that reveal another architecture.

A config whose ``model_type`` was edited (DeepSeek-V3.2 called ``deepseek_v3``), or that was saved for a fork of a
family, would be computed without the parts that these fields describe. The patterns name kinds of parts, so that they
match fields of new models too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from narrows.arch.configs.shown import shown
from narrows.errors import ConfigError

__all__ = ["is_foreign"]

_SCALED = "scaled activations (Granite, MiniCPM, Cohere, Falcon-H1, Llama 4)"
_PATTERNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention by an indexer (DeepSeek-V3.2, GLM-5)": (r"index(er)?_\w+|indexed_\w+",),
        "layers of linear attention (Qwen3-Next, Kimi-Linear, MiniMax)": (
            r"linear_\w+|kda_\w+|short_conv_\w+|full_attn_\w+|full_attention_interval",
            r"layer_group_size|attn_type_list|hybrid_\w+|layers_block_type",
        ),
        "state-space or convolution layers (Mamba, Jamba, LFM2)": (
            r"(use_)?mamba_\w+|ssm_\w+|time_step_\w+|state_size|conv_(kernel\w*|L_cache|bias|dim\w*)|attn_layer_\w+|lru_width|block_types",
        ),
        "latent attention (DeepSeek)": (r"(q|kv|o)_lora_rank|qk_(nope|rope)_head_dim|(qk|v)_head_dim|o_groups",),
        "routed experts": (
            r"(\w+_)?experts?(_\w+)?|moe_\w+|router_(hidden_size|scaling_factor)|route_scale|routed_\w+",
            r"first_k_dense_replace|decoder_sparse_step|mlp_only_layers|mlp_layer_types|interleave_moe_\w+",
            r"ffn_config|n_group|topk_group|topk_method|scoring_func|num_dense_layers|is_moe",
        ),
        "several residual streams (DeepSeek-V4)": (r"hc_\w+|compress_\w+|n(um)?_hash_layers|\w*residual_streams?",),
        "parts of Gemma": (
            r"\w*soft_?cap(ping)?|query_pre_attn_scalar|altup_\w+|laurel_\w+|hidden_size_per_layer_input",
            r"num_kv_shared_layers|activation_sparsity_pattern|attention_k_eq_v",
        ),
        _SCALED: (
            r"\w+_multipliers?|logits_scaling|logit_scale|scale_emb|scale_depth|dim_model_base|mup_\w+",
            r"(attention|attn|softmax|qk|residual|embedding|output|logits?|floor)_scal\w+|attention_value_scale",
            r"attn_temperature_tuning|llama_4_scaling\w*",
        ),
        "other positions, or not in all layers (SmolLM3, Llama 4, GPT-NeoX, Qwen 1)": (
            r"no_rope_\w+|(use_)?nope(_\w+)?|(use_)?alibi|position_embedding_type",
            r"rope_\w+|rotary_\w+|use_(dynamic_ntk|logn_attn)",
        ),
        "attention to a part of the context": (
            r"sliding_window\w*|use_sliding_window|max_window_layers|layer_types|swa_\w+|global_attn_\w+|window_size",
            r"(\w+_)?sinks?(_\w+)?|attention_chunk_size|attention_window_size",
        ),
        "other norms (Cohere, Falcon, StarCoder 2)": (
            r"use_(sandwich|post|pre)_norm|(post|pre|sandwich)_norm\w*|norm_(type|epsilon|after)|layer_?norm_eps(ilon)?",
            r"use_parallel_residual|parallel_attn",
        ),
        "biases of other families": (
            r"(use_)?bias|(use_)?qkv_bias|(lm_head|out|attention_out|mlp|attention)_bias|enable_bias|add_bias_linear",
        ),
        "norms or clips of queries and keys": (r"(use_)?qk_(layer_?)?norm\w*|clip_qkv|qk_l2_\w+",),
        "differential attention (DiffLlama)": (r"lambda_\w+",),
        "gates (gpt-oss, Qwen3-Next)": (
            r"swiglu_(limit|alpha)|activation_(params|kwargs)|gating|attn_output_gate|use_attention_gate|output_gate_type",
        ),
        "a model of more than text": (r"(text|vision|audio|speech|image|video|thinker|talker)_config|mrope_section",),
        "an encoder": (r"cross_attention_\w+|num_decoder_layers|num_encoder_layers|encoder_layers|decoder_layers",),
        "layers that differ from each other": (
            r"per_layer_config|block_configs|num_attention_heads_per_layer|ple_\w+|\w*ngram_(size|vocab)\w*",
        ),
    }
)
_UNSET: tuple[object, ...] = (None, False, 0, "", "none", "default", "rope", "rotary", [], {})
"""The values that mean that a part is absent."""


def is_foreign(field: str, value: object, within: str = "") -> bool:
    """Whether ``field`` (of the object ``within``) belongs to a part of another architecture, with a value that means
    absent.

    Raises:
        ConfigError: its value means that the part exists.
    """
    for words, patterns in _PATTERNS.items():
        if not any(re.fullmatch(pattern, field) for pattern in patterns):
            continue
        if value in _UNSET or (words is _SCALED and value == 1):
            return True
        where = f"{within}.{field}" if within else field
        raise ConfigError(f"{where} is {shown(value)}, which stands for {words}; this model_type has none")
    return False
