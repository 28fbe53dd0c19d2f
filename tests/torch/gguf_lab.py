"""Writes GGUF files from transformers' models the way llama.cpp's converter does, for tests.

Each architecture is written out on its own, from llama.cpp's ``conversion/`` sources: which rows it reorders, which
tensors it stacks or cuts, which keys it writes. Weights are then quantised, and the model gets the decoded values: so
it computes what a reader of the file must compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

COMMON = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK_YARN = {**YARN, "rope_type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}


def configs() -> dict[str, PreTrainedConfig]:
    """A small model of every kind that GGUF files hold, by a name for it."""

    def rope(theta: float = 5000.0, **scaling: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}

    head_dim = {"head_dim": 32}
    moe = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
    v2 = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    v3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    return {
        "llama": LlamaConfig(**COMMON, **rope(), rms_norm_eps=1e-5),
        "llama, linear": LlamaConfig(**COMMON, **rope(rope_type="linear", factor=4.0)),
        "llama, biases": LlamaConfig(**COMMON, **rope(), attention_bias=True, mlp_bias=True),
        "mistral": MistralConfig(**COMMON, **rope(1e6), sliding_window=None),
        "qwen2": Qwen2Config(**COMMON, **rope(1e6)),
        "qwen2, yarn": Qwen2Config(**COMMON, **rope(1e6, rope_type="yarn", **YARN)),
        "qwen3": Qwen3Config(**{**COMMON, "hidden_size": 96}, **head_dim, **rope(1e6)),
        "qwen3, tied": Qwen3Config(**{**COMMON, "tie_word_embeddings": True}, **head_dim, **rope(1e6)),
        "qwen3moe": Qwen3MoeConfig(**COMMON, **head_dim, **moe, **rope(1e6)),
        "deepseek v2": DeepseekV2Config(**COMMON | LATENT | v2, **rope(1e4, **DEEPSEEK_YARN)),
        "deepseek v2, grouped": DeepseekV2Config(
            **COMMON | LATENT | v2 | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
            **rope(1e4),
        ),
        "deepseek v2 lite": DeepseekV2Config(**COMMON | LATENT | v2 | {"q_lora_rank": None}, **rope(1e4)),
        "deepseek v3": DeepseekV3Config(**COMMON | LATENT | v3, **rope(1e4, **DEEPSEEK_YARN)),
    }


def dense_deepseek() -> PreTrainedConfig:
    """DeepSeek's attention without routed experts (Youtu is such a model)."""
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return DeepseekV2Config(**COMMON | LATENT | {"first_k_dense_replace": 3, "n_group": 1, "topk_group": 1}, **theta)


def model_of(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A random model whose every parameter matters, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                weight.copy_(1 + torch.randn_like(weight) * 0.2)
            elif name.endswith("inv_freq"):
                continue
            elif "score_correction" in name or name.endswith("bias"):
                weight.copy_(torch.randn_like(weight) * 0.1)
            else:
                weight.copy_(torch.randn_like(weight) * 0.08)
    return model


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp rotates them for Llama: pairs beside one another."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tensors_of(model: Any, *, whole_kv_b: bool = False, fused_experts: bool = False) -> Iterator[tuple[str, Tensor]]:
    """GGUF's tensors of a model by their names, as views: before rows are reordered, and before quantisation."""
    config = model.config
    state = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if "score" in k}}
    for name, value in state.items():
        value = value.detach()
        if not name.startswith("model.layers."):
            yield TOP.get(name, "output.weight"), value
            continue
        _, _, layer, rest = name.split(".", 3)
        block = f"blk.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            if fused_experts:
                yield block + "ffn_gate_up_exps.weight", value
                continue
            gate, up = value.chunk(2, dim=1)
            yield block + "ffn_gate_exps.weight", gate
            yield block + "ffn_up_exps.weight", up
        elif rest == "self_attn.kv_b_proj.weight" and not whole_kv_b:
            heads = config.num_attention_heads
            keys, values = value.unflatten(0, (heads, -1)).split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            yield block + "attn_k_b.weight", keys.transpose(1, 2)
            yield block + "attn_v_b.weight", values
        elif rest in NAMES:
            yield block + NAMES[rest], value
        else:
            stem, ending = rest.rsplit(".", 1)
            yield f"{block}{NAMES[stem]}.{ending}", value


def permuted_heads(config: Any, name: str) -> int | None:
    """Heads of a tensor whose rows the converter reorders."""
    if config.model_type not in ("llama", "mistral") or name.split(".")[-2] not in ("attn_q", "attn_k"):
        return None
    return config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads


ARCHES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}


def fields_of(config: Any, *, whole_kv_b: bool = False) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes of a config, by key without the architecture."""
    rope = config.rope_parameters
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields |= {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        fields |= _latent_fields(config, whole_kv_b)
        if "mscale_all_dim" in rope:
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
        return fields
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type != "qwen2":
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type in ("llama", "mistral"):
        fields |= {"rope.dimension_count": head_dim}
    if config.model_type == "qwen3_moe":
        fields |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return fields


def _latent_fields(config: Any, whole_kv_b: bool) -> dict[str, Any]:
    head_dim, rank, rope = (
        config.qk_nope_head_dim + config.qk_rope_head_dim,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
    )
    fields = {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }
    if whole_kv_b:  # files older than llama.cpp's absorbed attention
        fields |= {"attention.key_length": head_dim, "attention.value_length": config.v_head_dim}
    else:
        fields |= {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + rope,
            "attention.value_length": rank,
            "attention.key_length_mla": head_dim,
            "attention.value_length_mla": config.v_head_dim,
        }
    if config.q_lora_rank is not None:
        fields["attention.q_lora_rank"] = config.q_lora_rank
    if (config.n_group or 1) > 1:
        fields |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if config.model_type == "deepseek_v3":
        fields |= {"expert_gating_func": 2, "expert_weights_norm": config.norm_topk_prob}
    return fields


def vocabulary(size: int) -> dict[str, Any]:
    """A byte-level tokenizer of ``size`` tokens, as metadata."""
    alphabet = [*(chr(c) for c in range(33, 127)), "Ġ", "Ċ"]
    merges = ["t h", "th e", "Ġ the", "1 2"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + [f"<unused{i}>" for i in range(size - len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (size - 3)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_model(
    path: Path,
    model: Any,
    *,
    kinds: Sequence[Kind] = (Kind.F32,),
    metadata: Mapping[str, Any] = {},
    drop: Sequence[str] = (),
    tensors: Mapping[str, np.ndarray] = {},
    whole_kv_b: bool = False,
    fused_experts: bool = False,
) -> Path:
    """Write ``model`` to ``path``; its matrices take ``kinds`` in turn, and become the decoded values.

    ``metadata``, by key without the architecture for its own fields: replaced, or left out where None. ``drop``:
    tensors to leave out, ``tensors``: to add.
    """
    held = {}
    for i, (name, value) in enumerate(tensors_of(model, whole_kv_b=whole_kv_b, fused_experts=fused_experts)):
        kind = Kind.F32 if value.dim() == 1 or "ffn_gate_inp" in name else kinds[i % len(kinds)]
        data = gguf.quants.quantize(value.contiguous().numpy(), kind)
        held[name] = (data, kind)
        with torch.no_grad():
            value.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(value.shape)))
        heads = permuted_heads(model.config, name)
        if heads is not None:
            held[name] = (permute(data, heads), kind)
    arch = ARCHES[model.config.model_type]
    fields = fields_of(model.config, whole_kv_b=whole_kv_b)
    own = {key: value for key, value in metadata.items() if not key.startswith(("tokenizer.", "general.", "split."))}
    others = {key: value for key, value in metadata.items() if key not in own}
    values = {f"{arch}.{key}": value for key, value in (fields | own).items()}
    held |= {name: (data, Kind.F32) for name, data in tensors.items()}
    held = {name: data for name, data in held.items() if name not in drop}
    return write_file(path, arch, values | vocabulary(model.config.vocab_size) | others, held)


def write_file(
    path: Path, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, Kind]], **options: Any
) -> Path:
    """A GGUF file of these values; ``options`` are the writer's (to split the file)."""
    writer = gguf.GGUFWriter(path, arch, **options)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
