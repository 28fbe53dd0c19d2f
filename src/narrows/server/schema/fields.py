"""Request fields of OpenAI's API, vLLM, SGLang and llama.cpp that this server does not have: refused or ignored.

A field that decides the text is refused unless its value changes nothing; one that cannot change the text is ignored.
Fields that work are in the schemas. ``benchmarks/request_fields_page.py`` prints docs/request-fields.md from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["IGNORED", "REFUSED", "Refused", "refusal_of"]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a field is refused, and the alternative; ``harmless``: values without effect, beside null."""

    reason: str
    harmless: tuple[Any, ...] = ()


_NO_SAMPLER = "this server has no such sampler; use temperature, top_p, top_k or min_p"
_NO_BEAMS = "this server samples, it does not search; leave it out"
_NO_MEDIA = "this server reads and writes text only"
_NO_ADAPTERS = "this server runs the model without adapters"
_NO_PLUGINS = "this server runs no code of clients; use logit_bias, allowed_token_ids or a grammar"
_OLD_FUNCTIONS = "OpenAI's API no longer has this form; use tools and tool_choice"
_TAGS = "structural tags are not supported; use a grammar, or tools with tool_choice"
_CUT_REASONING = "reasoning has no budget of its own here; use max_completion_tokens"

REFUSED: Mapping[str, Refused] = {
    "audio": Refused(_NO_MEDIA),
    "bad_words": Refused("words cannot be forbidden; use logit_bias with -100 for tokens, or a grammar", ([],)),
    "best_of": Refused("texts are not ranked; use n", (1,)),
    "chat_template": Refused("the checkpoint's own template is used; render the prompt and use /v1/completions"),
    "custom_logit_processor": Refused(_NO_PLUGINS, ([],)),
    "custom_params": Refused(_NO_PLUGINS, ({},)),
    "documents": Refused("put the text of the documents into a message", ([],)),
    "dry_multiplier": Refused(_NO_SAMPLER + "; repetition_penalty works", (0,)),
    "dynatemp_range": Refused(_NO_SAMPLER, (0,)),
    "echo": Refused("a chat is not repeated in its answer; use continue_final_message and join the texts", (False,)),
    "function_call": Refused(_OLD_FUNCTIONS, ("none",)),
    "functions": Refused(_OLD_FUNCTIONS, ([],)),
    "grammar_lazy": Refused("a grammar applies from the first token on; leave it out", (False,)),
    "grammar_triggers": Refused("a grammar applies from the first token on; leave it out", ([],)),
    "id_slot": Refused("requests are placed by the scheduler; leave it out", (-1,)),
    "images_config": Refused(_NO_MEDIA, ({},)),
    "include_reasoning": Refused("reasoning is always returned as reasoning_content; ignore it there", (True,)),
    "input_ids": Refused("send token ids as prompt to /v1/completions"),
    "length_penalty": Refused(_NO_BEAMS, (1,)),
    "logits_processors": Refused(_NO_PLUGINS, ([],)),
    "lora": Refused(_NO_ADAPTERS, ([],)),
    "lora_path": Refused(_NO_ADAPTERS),
    "max_dynamic_patch": Refused(_NO_MEDIA),
    "media_io_kwargs": Refused(_NO_MEDIA, ({},)),
    "min_dynamic_patch": Refused(_NO_MEDIA),
    "min_keep": Refused("samplers have no minimum of tokens; raise min_p or top_p", (0,)),
    "mirostat": Refused(_NO_SAMPLER, (0,)),
    "mm_processor_kwargs": Refused(_NO_MEDIA, ({},)),
    "modalities": Refused(_NO_MEDIA, (["text"], [])),
    "moderation": Refused("texts are not moderated here"),
    "n_cmpl": Refused("use n", (1,)),
    "n_indent": Refused("lines are not indented for the model; use a grammar", (0,)),
    "n_keep": Refused("the context is never shifted: a text ends where it is full", (0, -1)),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "prompt_logprobs": Refused("use echo with logprobs in /v1/completions"),
    "reasoning_control": Refused("reasoning cannot be ended from outside; leave it out", (False,)),
    "reasoning_format": Refused(
        "reasoning is in reasoning_content; a server started with --reasoning-parser none leaves it in the text",
        ("auto", "deepseek"),
    ),
    "repeat_last_n": Refused("penalties cover the whole text; leave it out", (-1, 64)),
    "repeat_penalty": Refused("use repetition_penalty, which covers the whole text", (1,)),
    "repetition_detection": Refused("loops in texts are not detected; use repetition_penalty or frequency_penalty"),
    "response_fields": Refused("answers have OpenAI's shape; leave it out", ([],)),
    "samplers": Refused("samplers apply in one fixed order; leave it out"),
    "separate_reasoning": Refused("reasoning is always returned as reasoning_content", (True,)),
    "session_params": Refused("sessions are not stored; send the whole conversation", ({},)),
    "stop_regex": Refused("stops are texts and token ids; use stop", ([], "")),
    "stream_reasoning": Refused("reasoning is always streamed", (True,)),
    "structural_tag": Refused(_TAGS),
    "suffix": Refused("text is only generated after the prompt", ("",)),
    "t_max_predict_ms": Refused("a text is bounded in tokens; use max_tokens", (0, -1)),
    "task": Refused("put it into the messages or chat_template_kwargs"),
    "tfs_z": Refused(_NO_SAMPLER, (1,)),
    "thinking_token_budget": Refused(_CUT_REASONING, (-1,)),
    "top_n_sigma": Refused(_NO_SAMPLER, (-1, 0)),
    "typical_p": Refused(_NO_SAMPLER, (1,)),
    "use_audio_in_video": Refused(_NO_MEDIA, (False,)),
    "use_beam_search": Refused(_NO_BEAMS, (False,)),
    "verbosity": Refused("request the length of the answer in a message", ("medium",)),
    "vllm_xargs": Refused(_NO_PLUGINS, ({},)),
    "watermarking": Refused("texts get no watermark; leave it out", (False,)),
    "web_search_options": Refused("this server does not search the web; give the model a tool"),
    "xtc_probability": Refused(_NO_SAMPLER, (0,)),
}
"""By name, for every route whose body does not have the field itself."""

_ADDS = "adds parts to the answer, and does not change the text"
_SCHEDULING = "decides where or when a request runs, not its text"
_SETS = "has no effect while its sampler is off"
_KEEPS = "concerns the operator's records of a request"

IGNORED: Mapping[str, str] = {
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room", "data_parallel_rank"), _SCHEDULING),
    **dict.fromkeys(
        ("disagg_prefill_dp_rank", "ec_transfer_params", "kv_transfer_params", "routed_dp_rank"), _SCHEDULING
    ),
    **dict.fromkeys(("cache_prompt", "cache_salt", "extra_key", "n_cache_reuse", "ngram_corpus_id"), _SCHEDULING),
    **dict.fromkeys(("prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"), _SCHEDULING),
    **dict.fromkeys(("service_tier", "session_id", "sse_ping_interval", "stream_interval"), _SCHEDULING),
    **dict.fromkeys(("guided_decoding_backend",), _SCHEDULING),
    **dict.fromkeys(("custom_labels", "metadata", "request_id", "rid", "safety_identifier", "store", "user"), _KEEPS),
    **dict.fromkeys(("logprob_token_ids", "n_probs", "post_sampling_probs", "return_cached_tokens_details"), _ADDS),
    **dict.fromkeys(("return_hidden_states", "return_meta_info", "return_mm_kwargs", "return_progress"), _ADDS),
    **dict.fromkeys(("return_prompt_text", "return_prompt_token_ids", "return_routed_experts"), _ADDS),
    **dict.fromkeys(("return_token_ids", "return_token_offsets", "return_tokens", "timings_per_token"), _ADDS),
    **dict.fromkeys(("return_tokens_as_token_ids", "routed_experts_prompt_start", "routed_experts_start_len"), _ADDS),
    **dict.fromkeys(("dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers"), _SETS),
    **dict.fromkeys(("dynatemp_exponent", "mirostat_eta", "mirostat_tau", "xtc_threshold"), _SETS),
    "spaces_between_special_tokens": "has no effect with fast tokenizers, the only ones supported",
}
"""By name, why it is safe to do nothing about it."""


def refusal_of(name: str, value: Any) -> str | None:
    """Why a field with this value is refused; None: it is not.

    >>> refusal_of("mirostat", 0), refusal_of("use_beam_search", False), refusal_of("no_field_at_all", 1)
    (None, None, None)
    >>> refusal_of("length_penalty", 2.0)
    'not supported: this server samples, it does not search; leave it out'
    """
    found = REFUSED.get(name)
    if found is None or value is None or any(_same(value, harmless) for harmless in found.harmless):
        return None
    return f"not supported: {found.reason}"


def _same(value: Any, harmless: Any) -> bool:
    """Equal, where a number is no boolean; 1 and 1.0 are."""
    return isinstance(value, bool) == isinstance(harmless, bool) and value == harmless
