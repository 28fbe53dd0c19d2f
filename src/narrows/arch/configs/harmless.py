"""Fields that any config may have and that change no number that narrows computes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["HARMLESS"]

_TRAINING = """
attention_dropout hidden_dropout residual_dropout embedding_dropout classifier_dropout resid_pdrop embd_pdrop
attn_pdrop initializer_range initializer_factor init_std output_router_logits router_aux_loss_coef
router_z_loss_coef moe_router_aux_loss_coef aux_loss_alpha seq_aux ep_size pretraining_tp
gradient_checkpointing use_cache keys_to_ignore_at_inference
"""
_IMPLEMENTATION = (
    "use_flash_attn use_flash_attn_2 use_mem_eff_path attn_implementation experts_implementation use_bfloat16"
)
_NAMES = """
architectures model_type transformers_version transformers.js_config auto_map name_or_path custom_pipelines
task_specific_params torchscript is_llama_config tie_encoder_decoder prefix finetuning_task tokenizer_class
is_decoder pruned_heads chunk_size_feed_forward tf_legacy_loss unsloth_version unsloth_fixed model_max_length
max_sequence_length
"""
_OUTPUTS = """
return_dict output_attentions output_hidden_states problem_type id2label label2id num_labels
tie_last_hidden_states
"""
_GENERATION = """
do_sample temperature top_k top_p typical_p min_p repetition_penalty max_length min_length max_new_tokens
num_beams num_beam_groups num_return_sequences length_penalty early_stopping no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids diversity_penalty output_scores return_dict_in_generate
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
forced_bos_token_id forced_eos_token_id
"""
_TOKENS = """
pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id
"""

HARMLESS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(_TRAINING.split(), "for training alone")
    | dict.fromkeys(_IMPLEMENTATION.split(), "which code computes, not what")
    | dict.fromkeys(_NAMES.split(), "a name, a version, or nothing that a decoder reads")
    | dict.fromkeys(_OUTPUTS.split(), "what transformers returns beside logits")
    | dict.fromkeys(_GENERATION.split(), "read from generation_config.json alone, as in transformers 5")
    | dict.fromkeys(_TOKENS.split(), "a token that no model reads")
)
"""Each such field, and why it is harmless."""
