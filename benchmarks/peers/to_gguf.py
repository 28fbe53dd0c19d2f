"""Writes a DeepSeek checkpoint folder as one bfloat16 GGUF file that llama.cpp loads.

    python benchmarks/peers/to_gguf.py FOLDER FILE

For the checkpoints of `make_mini.py`: no tokenizer is written, since works are token ids. Names and keys are those of
the architecture ``deepseek2``: experts stacked, and ``kv_b_proj`` cut into its keys (transposed) and its values, per
head, as attention over the latent needs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
GATING = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}


def write(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "deepseek2")
    _write_keys(writer, config)
    with safe_open(folder / "model.safetensors", "pt") as source:
        for name, tensor in _tensors(config, source):
            _add(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def _write_keys(writer: gguf.GGUFWriter, config: dict) -> None:
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # the latent is one key and value head for all
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(GATING[config["scoring_func"]])
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _tensors(config: dict, source: safe_open) -> Iterator[tuple[str, torch.Tensor]]:
    for theirs, ours in WHOLE.items():
        yield f"{ours}.weight", source.get_tensor(f"{theirs}.weight")
    names = set(source.keys())
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in OF_LAYER.items():
            if f"{prefix}{theirs}.weight" in names:
                yield f"{block}{ours}.weight", source.get_tensor(f"{prefix}{theirs}.weight")
        kv_b = source.get_tensor(f"{prefix}self_attn.kv_b_proj.weight")
        heads = kv_b.view(config["num_attention_heads"], -1, config["kv_lora_rank"])
        keys, values = heads.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
        yield f"{block}attn_k_b.weight", keys.transpose(1, 2)
        yield f"{block}attn_v_b.weight", values
        if f"{prefix}mlp.gate.weight" not in names:
            continue
        if (bias := f"{prefix}mlp.gate.e_score_correction_bias") in names:
            yield f"{block}exp_probs_b.bias", source.get_tensor(bias)
        for part in ("gate", "up", "down"):
            each = f"{prefix}mlp.experts.{{}}.{part}_proj.weight"
            stacked = [source.get_tensor(each.format(i)) for i in range(config["n_routed_experts"])]
            yield f"{block}ffn_{part}_exps.weight", torch.stack(stacked)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Vectors and the router in float32, as llama.cpp wants them; all else in bfloat16."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().numpy())
        return
    rows = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]), Path(sys.argv[2]))
