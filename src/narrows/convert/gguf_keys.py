"""What narrows does with each key of a GGUF file's metadata: obeys it, passes it by, or refuses the file.

A key under the architecture's own prefix, or under ``tokenizer.ggml.``, that is in none of these tables is refused, as
it may change the numbers. Keys elsewhere are records (names, licences, how a file was quantised). A test compares the
tables with the gguf package's list, so a new release of it shows its new keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_part import shown
from narrows.errors import ConfigError

__all__ = ["HARMLESS", "NEUTRAL", "OBEYED", "OBEYED_BY", "REFUSED", "check_keys", "gguf_notes"]

OBEYED = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",  # refused where it would slide
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
        "vocab_size",
    }
)
"""Keys that every architecture here obeys, or refuses by their value, without the prefix ``<architecture>.``"""

_EXPERTS = frozenset({"expert_count", "expert_feed_forward_length", "expert_used_count"})
OBEYED_BY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "qwen3moe": _EXPERTS,
        "deepseek2": _EXPERTS
        | {
            "attention.key_length_mla",
            "attention.kv_lora_rank",
            "attention.q_lora_rank",
            "attention.value_length_mla",
            "expert_gating_func",
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "expert_weights_norm",
            "expert_weights_scale",
            "leading_dense_block_count",
            "nextn_predict_layers",
        },
    }
)
"""Further ones of single architectures."""

HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "pooling_type": "how an embedding is made of a text's vectors; logits are the same",
        "rope.scaling.finetuned": "a record of the training",
        "tensor_data_layout": "q and k lie as llama.cpp's converter puts them, whichever layout they came from",
    }
)
"""Keys that change no number that narrows computes, and why."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attention.output_scale": (0, 1),
        "attention.scale": (0,),
        "attention.shared_kv_layers": (0,),
        "attention.temperature_length": (0,),
        "attention.temperature_scale": (0,),
        "attn_logit_softcapping": (0,),
        "embedding_scale": (0, 1),
        "expert_chunk_feed_forward_length": (0,),
        "expert_count": (0,),
        "expert_feed_forward_length": (0,),
        "expert_gating_func": (0, 1),
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
        "expert_shared_count": (0,),
        "expert_shared_feed_forward_length": (0,),
        "expert_used_count": (0,),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0, 1),
        "experts_per_group": (0,),
        "final_logit_softcapping": (0,),
        "interleave_moe_layer_step": (0, 1),
        "leading_dense_block_count": (0,),
        "logit_scale": (0, 1),
        "moe_every_n_layers": (0, 1),
        "moe_latent_size": (0,),
        "n_deepstack_layers": (0,),
        "nextn_predict_layers": (0,),
        "residual_scale": (0, 1),
        "rope.scaling.alpha": (0,),
        "router_logit_softcapping": (0,),
        "swin_norm": (False,),
        "use_parallel_residual": (False,),
    }
)
"""Keys that narrows does not obey, and the values at which they change nothing; at any other the file is refused."""

REFUSED = frozenset(
    {
        "activation_sparsity_scale",
        "altup.active_idx",
        "altup.num_inputs",
        "attention.decay_lora_rank",
        "attention.gate_lora_rank",
        "attention.group_norm_epsilon",
        "attention.group_norm_groups",
        "attention.iclr_lora_rank",
        "attention.indexer.head_count",
        "attention.indexer.key_length",
        "attention.indexer.top_k",
        "attention.key_length_mla",
        "attention.key_length_swa",
        "attention.kv_lora_rank",
        "attention.layer_norm_epsilon",
        "attention.q_lora_rank",
        "attention.relative_buckets_count",
        "attention.sliding_window_pattern",
        "attention.value_length_mla",
        "attention.value_length_swa",
        "attention.value_residual_mix_lora_rank",
        "classifier.output_labels",
        "convnext.block_count",
        "convnext.embedding_length",
        "decoder_block_count",
        "decoder_start_token_id",
        "embedding_length_out",
        "embedding_length_per_layer_input",
        "expert_group_scale",
        "features_length",
        "full_attention_interval",
        "kda.head_dim",
        "posnet.block_count",
        "posnet.embedding_length",
        "rescale_every_n_layers",
        "rope.dimension_count_swa",
        "rope.dimension_sections",
        "rope.freq_base_swa",
        "shortconv.l_cache",
        "ssm.conv_kernel",
        "ssm.dt_b_c_rms",
        "ssm.group_count",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
        "time_decay_extra_dim",
        "time_mix_extra_dim",
        "token_shift_count",
        "wkv.head_size",
        "{dense}_feat_in",
        "{dense}_feat_out",
    }
)
"""Keys of the gguf package that are refused wherever they stand: they belong to other architectures."""

TOKENIZER_OBEYED = frozenset(
    {
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
        "bos_token_id",
        "eom_token_id",
        "eos_token_id",
        "eot_token_id",
        "merges",
        "model",
        "padding_token_id",
        "pre",
        "scores",
        "token_type",
        "tokens",
        "unknown_token_id",
    }
)
TOKENIZER_HARMLESS = frozenset(  # roles that no text of a language model takes by itself
    {
        "cls_token_id",
        "fim_mid_token_id",
        "fim_pad_token_id",
        "fim_pre_token_id",
        "fim_rep_token_id",
        "fim_sep_token_id",
        "fim_suf_token_id",
        "mask_token_id",
        "middle_token_id",
        "prefix_token_id",
        "seperator_token_id",
        "suffix_token_id",
        "token_type_count",
    }
)
TOKENIZER_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "add_sep_token": (False,),
        "normalizer.lowercase": (False,),
        "normalizer.strip_accents": (False,),
        "precompiled_charsmap": ([],),
        "remove_extra_whitespaces": (False,),
        "suppress_tokens": ([],),
    }
)

SAMPLING_OBEYED = frozenset({"temp", "top_k", "top_p", "min_p", "penalty_repeat"})
SAMPLING_DETAILS = frozenset({"mirostat_eta", "mirostat_tau", "xtc_threshold"})  # of ways that others switch on
SAMPLING_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType({"mirostat": (0,), "xtc_probability": (0,)})


def check_keys(file: GgufHeader) -> None:
    """Refuse a file with a key that may change the numbers and that narrows does not obey.

    Raises:
        ConfigError: naming the key, its value, and the values that would do.
    """
    kind = file.get("general.type", str, "model")
    if kind != "model":
        raise ConfigError(f"{file.path} holds no model: its general.type is {kind!r}; give the model's own file")
    if (version := file.get("general.quantization_version", int, 2)) != 2:
        raise ConfigError(
            f"{file.path} is quantised by ggml's version {version}; supported: 2, as all files since 2023"
        )
    arch = file.need("general.architecture", str)
    for key, value in file.metadata.items():
        for prefix, obeyed, neutral in (
            (f"{arch}.", OBEYED | OBEYED_BY.get(arch, frozenset()) | HARMLESS.keys(), NEUTRAL),
            ("tokenizer.ggml.", TOKENIZER_OBEYED | TOKENIZER_HARMLESS, TOKENIZER_NEUTRAL),
        ):
            name = key.removeprefix(prefix)
            if name == key or name in obeyed:
                continue
            if value not in neutral.get(name, ()):
                way_out = f"supported: {' or '.join(map(str, neutral[name]))}, " if name in neutral else "supported: "
                raise ConfigError(
                    f"{file.path}: {shown(key)} is {value!r:.60}, which narrows does not obey for the architecture "
                    f"{arch!r}; {way_out}files without it"
                )


def gguf_notes(file: GgufHeader) -> tuple[str, ...]:
    """What of the file's recommendations is left out, in words: ways of sampling that narrows does not have."""
    prefix, left = "general.sampling.", []
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in SAMPLING_OBEYED | SAMPLING_DETAILS or value in SAMPLING_NEUTRAL.get(name, ()):
            continue
        left.append(f"{shown(name)} {value!r:.40}")
    return (f"the file recommends sampling that narrows does not have, left out: {', '.join(left)}",) if left else ()
