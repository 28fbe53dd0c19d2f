"""A GGUF file's metadata as the fields of ``config.json`` and ``generation_config.json``.

Absent keys mean what they mean to llama.cpp. A key whose number narrows cannot obey is refused by name (`gguf_keys`).
Opens no tensor but the small one of rotary factors. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from narrows.convert.gguf_families import SIGMOID, Family, gating, gguf_family
from narrows.convert.gguf_fields import Fields, shortest
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_keys import check_keys
from narrows.convert.gguf_rope import rope_scaling
from narrows.errors import CheckpointError, ConfigError

__all__ = ["gguf_config", "gguf_generation_config", "special_token_ids"]

ROLES = MappingProxyType({"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"})  # ours -> GGUF's word
SENTENCEPIECE_IDS = MappingProxyType({"unk": 0, "bos": 1, "eos": 2})  # where a sentencepiece file does not say
SAMPLING = MappingProxyType(  # generation_config.json's field -> GGUF's key
    {
        "temperature": "general.sampling.temp",
        "top_k": "general.sampling.top_k",
        "top_p": "general.sampling.top_p",
        "min_p": "general.sampling.min_p",
        "repetition_penalty": "general.sampling.penalty_repeat",
    }
)


def gguf_config(file: GgufHeader, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The fields of ``config.json``, for weights kept as ``dtype``.

    Raises:
        ConfigError: an architecture, a variant of one, or a key that narrows does not obey; the message names it.
        CheckpointError: metadata that is missing or contradicts itself.
    """
    family = gguf_family(file)
    check_keys(file)
    fields = Fields(file)
    ids = special_token_ids(file)
    theta = fields.positive("rope.freq_base", 10000.0)
    attention = _latent(fields) if family.latent else _grouped(fields, family)
    rope_dim = attention["qk_rope_head_dim"] if family.latent else attention["head_dim"]
    config = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "vocab_size": _vocab(fields),
        "hidden_size": fields.count("embedding_length"),
        "num_hidden_layers": _layers(fields),
        **attention,
        **_mlp(fields, family),
        "hidden_act": "silu",
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(fields, theta=theta, rope_dim=rope_dim),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": dtype,
        **{f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids},
    }
    _check_window(fields)
    return config


def gguf_generation_config(file: GgufHeader) -> dict[str, Any]:
    """The fields of ``generation_config.json``: ids, and the sampling that the file recommends, if it does.

    A chat's end of turn and of message, where the file names them, end a text as eos does.
    """
    ids: dict[str, Any] = dict(special_token_ids(file))
    ends = [ids.get("eos"), _token_id(file, "eot"), _token_id(file, "eom")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if len(ends) > 1:
        ids["eos"] = ends
    config = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    sampling = {field: file.get(key, int if field == "top_k" else float) for field, key in SAMPLING.items()}
    sampling = {k: shortest(v) if isinstance(v, float) else v for k, v in sampling.items() if v is not None}
    return {**config, **({"do_sample": True} if sampling else {}), **sampling}


def special_token_ids(file: GgufHeader) -> dict[str, int]:
    """Ids of the roles that the file names, of ``bos``, ``eos``, ``unk`` and ``pad``."""
    found = {role: _token_id(file, word) for role, word in ROLES.items()}
    if file.get("tokenizer.ggml.model", str) == "llama":
        num_tokens = len(file.need("tokenizer.ggml.tokens", list[str]))
        usual: Mapping[str, int] = {role: token for role, token in SENTENCEPIECE_IDS.items() if token < num_tokens}
        found |= {role: token for role, token in usual.items() if found[role] is None}
    return {role: token for role, token in found.items() if token is not None}


def _token_id(file: GgufHeader, word: str) -> int | None:
    token: int | None = file.get(f"tokenizer.ggml.{word}_token_id", int)
    num_tokens = len(file.need("tokenizer.ggml.tokens", list[str]))
    if token is not None and not 0 <= token < num_tokens:
        raise CheckpointError(f"{file.path}: {word} token id {token} is outside the {num_tokens} tokens")
    return token


def _vocab(fields: Fields) -> int:
    """Rows of the embedding, which may be more than the tokenizer's tokens (padding)."""
    file = fields.file
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight; fetch a complete file")
    rows = file.tensors["token_embd.weight"].shape[0] if file.tensors["token_embd.weight"].shape else 0
    if (num_tokens := len(file.need("tokenizer.ggml.tokens", list[str]))) > rows:
        raise CheckpointError(f"{file.path} has {num_tokens} tokens but embeddings for {rows}")
    if (stated := fields.integer("vocab_size", rows)) != rows:
        raise CheckpointError(f"{file.path}: {fields.key('vocab_size')} is {stated}, but there are {rows} embeddings")
    return rows


def _layers(fields: Fields) -> int:
    """Decoder layers, without those at the end that predict further tokens, which narrows leaves out."""
    layers = fields.count("block_count") - fields.integer("nextn_predict_layers", 0)
    if not 0 < layers <= len(fields.file.tensors):
        raise CheckpointError(
            f"{fields.file.path}: {fields.key('block_count')} and nextn_predict_layers make {layers} layers of "
            f"{len(fields.file.tensors)} tensors"
        )
    return layers


def _heads(fields: Fields) -> int:
    return fields.count("attention.head_count")


def _grouped(fields: Fields, family: Family) -> dict[str, Any]:
    """Grouped-query attention: heads, their width, and whether projections have biases."""
    hidden, heads = fields.count("embedding_length"), _heads(fields)
    kv_heads = fields.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{fields.file.path} has {heads} attention heads and {kv_heads} key-value heads; "
            "supported: the first a multiple of the second"
        )
    head_dim = fields.count("attention.key_length", hidden // heads or None)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (found := fields.integer(field, head_dim)) != head_dim:
            raise ConfigError(
                f"{fields.file.path} has {fields.key(field)} {found} but heads of {head_dim}; supported: equal ones"
            )
    config: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    if not family.biases:
        config["attention_bias"] = _has_biases(fields.file, ("attn_q", "attn_k", "attn_v", "attn_output"))
    return config | ({"pretraining_tp": 1} if family.model_type == "llama" else {"use_sliding_window": False})


def _latent(fields: Fields) -> dict[str, Any]:
    """DeepSeek's attention. Files with keys ``..._mla`` give its heads there, and elsewhere those of the latent."""
    heads, rope = _heads(fields), fields.count("rope.dimension_count")
    kv_rank = fields.count("attention.kv_lora_rank")
    head_dim = fields.count("attention.key_length_mla", fields.count("attention.key_length"))
    value_dim = fields.count("attention.value_length_mla", fields.count("attention.value_length"))
    has_mla = fields.has("attention.key_length_mla")
    expected = {
        "attention.head_count_kv": (1, heads),
        "attention.key_length": (kv_rank + rope,) if has_mla else (head_dim,),
        "attention.value_length": (kv_rank,) if has_mla else (value_dim,),
    }
    for field, allowed in expected.items():
        if (found := fields.integer(field, allowed[-1])) not in allowed:
            raise CheckpointError(
                f"{fields.file.path}: {fields.key(field)} is {found}, but the other fields make it {allowed[-1]}"
            )
    if head_dim <= rope:
        raise CheckpointError(f"{fields.file.path}: heads of {head_dim} columns cannot rotate {rope} and keep some")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": fields.count("attention.q_lora_rank") if fields.has("attention.q_lora_rank") else None,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value_dim,
        "attention_bias": False,
    }


def _mlp(fields: Fields, family: Family) -> dict[str, Any]:
    """The dense layers' width and biases, and the routed experts."""
    bias = {"mlp_bias": _has_biases(fields.file, ("ffn_gate", "ffn_up", "ffn_down"))}
    if family.model_type == "qwen3_moe":
        return {
            "intermediate_size": fields.count("feed_forward_length", fields.count("expert_feed_forward_length")),
            "num_experts": fields.count("expert_count"),
            "num_experts_per_tok": fields.count("expert_used_count"),
            "moe_intermediate_size": fields.count("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp always does
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if not family.experts:
        return {"intermediate_size": fields.count("feed_forward_length"), **(bias if family.rows_reordered else {})}
    dense, layers = fields.integer("leading_dense_block_count", 0), _layers(fields)
    if dense > layers:
        raise CheckpointError(f"{fields.file.path}: {dense} leading dense blocks, but {layers} layers")
    width = {"intermediate_size": fields.integer("feed_forward_length", 0 if dense == 0 else None)}
    if dense == layers:  # the class has experts; their first layer says that no layer uses them
        none = {
            "n_routed_experts": fields.integer("expert_count", 0) or 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": fields.count("expert_feed_forward_length", fields.count("feed_forward_length")),
        }
        return width | none | {"first_k_dense_replace": layers}
    return width | _deepseek_experts(fields, dense)


def _deepseek_experts(fields: Fields, dense: int) -> dict[str, Any]:
    groups = fields.integer("expert_group_count", 1) or 1
    sigmoid, norm = gating(fields) == SIGMOID, fields.flag("expert_weights_norm")
    if norm and not sigmoid:
        raise fields.refuse("expert_weights_norm", "supported with softmax scores: false, as DeepSeek V2 has it")
    scale = fields.number("expert_weights_scale", 0.0)
    if scale < 0:
        raise fields.refuse("expert_weights_scale", "it must be above 0, or 0 for none")
    greedy = "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "n_routed_experts": fields.count("expert_count"),
        "num_experts_per_tok": fields.count("expert_used_count"),
        "moe_intermediate_size": fields.count("expert_feed_forward_length"),
        "n_shared_experts": fields.integer("expert_shared_count", 0),
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else greedy,
        "n_group": groups,
        "topk_group": fields.integer("expert_group_used_count", groups) or 1,
        "norm_topk_prob": norm,
        "routed_scaling_factor": scale or 1.0,
    }


def _has_biases(file: GgufHeader, projections: tuple[str, ...]) -> bool:
    """Whether any layer has a bias on one of them. Where others lack it, it is zero."""
    names = tuple(f".{projection}.bias" for projection in projections)
    return any(name.endswith(names) for name in file.tensors)


def _check_window(fields: Fields) -> None:
    window = fields.integer("attention.sliding_window", 0)
    if 0 < window < fields.count("context_length"):
        raise fields.refuse(
            "attention.sliding_window", "narrows attends to the whole context; supported: its length or 0"
        )
