"""What a model is, in numbers: the frozen form of a Hugging Face ``config.json`` that everything else reads.

Knows the checkpoint's own field names and nothing of ranks, stages or torch. Field names are kept as they stand in
``config.json`` (transformers 4 and 5), so that a reader can put the two side by side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.arch.config_file import config_file
from narrows.errors import CheckpointError, ConfigError
from narrows.files import read_json_object

__all__ = ["GQA", "MLA", "MoE", "ModelConfig", "Quantization", "read_config"]

_MODEL_TYPES = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "glm4_moe": "glm4_moe",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention: queries and keys come from low-rank latents (DeepSeek-V2, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of what the cache keeps per token: the compressed latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qkv_latent_dim(self) -> int:
        """Width of the low-rank projection's output: ``q_lora_rank + kv_lora_rank + qk_rope_head_dim``."""
        return (self.q_lora_rank or 0) + self.latent_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GQA:
    """Grouped-query attention: ``num_key_value_heads`` heads of keys and values serve all query heads."""

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Routed experts, and the rule that routes to them."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the checkpoint stores its linear weights, from ``quantization_config``.

    ``weight_block_size``: rows and columns of the blocks that share one scale; None where scales are laid otherwise.
    """

    quant_method: str
    weight_block_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. ``notes`` says in words what of the checkpoint is not used, such as the MTP layer."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    attention: MLA | GQA
    moe: MoE | None
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    mlp_bias: bool = False
    quantization: Quantization | None = None
    notes: tuple[str, ...] = ()

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` has routed experts; the first ``first_k_dense_replace`` layers are dense."""
        return self.moe is not None and layer >= self.moe.first_k_dense_replace


def read_config(source: Path | Mapping[str, Any], name: str = "") -> ModelConfig:
    """The model that a ``config.json`` (or a folder with one, or its parsed content) describes.

    Raises:
        CheckpointError: there is no ``config.json``, or it is not JSON, or a needed field is missing.
        ConfigError: an architecture or a variant of one that narrows does not know.
    """
    if isinstance(source, Path):
        file = config_file(source)
        return _Reader(read_json_object(file), str(file), name or Path(os.path.abspath(file)).parent.name).model()
    return _Reader(source, name or "config", name or "config").model()


class _Reader:
    """Reads one raw config; errors name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], where: str, name: str) -> None:
        self.raw, self.where, self.name = raw, where, name

    def need(self, *keys: str) -> Any:
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        raise CheckpointError(f"{self.where}: the field {keys[0]!r} is missing")

    def integer(self, *keys: str, default: int | None = None) -> int:
        present = next((k for k in keys if self.raw.get(k) is not None), None)
        if present is None and default is not None:
            return default
        value = self.need(*keys)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{self.where}: {present} is {value!r}, where a whole number >= 0 is needed")
        return value

    def count(self, *keys: str) -> int:
        """An integer of at least 1."""
        value = self.integer(*keys)
        if value < 1:
            raise CheckpointError(f"{self.where}: {keys[0]} is {value}; it must be at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, where a number is needed")
        return float(value)

    def model(self) -> ModelConfig:
        given = self.raw.get("model_type")
        if not isinstance(given, str) or given not in _MODEL_TYPES:
            known = ", ".join(sorted(_MODEL_TYPES))
            raise ConfigError(f"{self.where}: architecture {given!r} is not known to narrows; it knows {known}")
        model_type = _MODEL_TYPES[given]
        hidden_act = self.raw.get("hidden_act", "silu")
        if hidden_act != "silu":
            raise ConfigError(f"{self.where}: hidden_act {hidden_act!r} is not supported; only 'silu' is")
        if self.raw.get("use_sliding_window"):
            raise ConfigError(f"{self.where}: use_sliding_window is set; narrows attends to the whole context only")
        theta, scaling = self.rope()
        eos = self.raw.get("eos_token_id")
        quantization = self.quantization()
        is_mla = model_type.startswith("deepseek")
        moe = self.moe(model_type)
        all_moe = moe is not None and moe.first_k_dense_replace == 0
        return ModelConfig(
            name=self.name,
            model_type=model_type,
            hidden_size=self.count("hidden_size"),
            num_hidden_layers=self.count("num_hidden_layers"),
            num_attention_heads=self.count("num_attention_heads"),
            intermediate_size=self.integer("intermediate_size", default=0 if all_moe else None),
            vocab_size=self.count("vocab_size"),
            attention=self.mla() if is_mla else self.gqa(model_type),
            moe=moe,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            max_position_embeddings=self.integer("max_position_embeddings", default=2048),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            dtype=str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            eos_token_id=tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else (),
            bos_token_id=self.raw.get("bos_token_id"),
            mlp_bias=bool(self.raw.get("mlp_bias", False)),
            quantization=quantization,
            notes=self.notes(),
        )

    def notes(self) -> tuple[str, ...]:
        num_mtp = self.integer("num_nextn_predict_layers", default=0)
        notes: tuple[str, ...] = ()
        if num_mtp:
            notes += (
                f"{num_mtp} multi-token-prediction layer(s) of the checkpoint are skipped: narrows predicts one token",
            )
        return notes

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Transformers 5 writes ``rope_parameters``; 4 wrote ``rope_theta`` beside ``rope_scaling``."""
        parameters = self.raw.get("rope_parameters") or {}
        theta = float(parameters.get("rope_theta") or self.raw.get("rope_theta") or 10000.0)
        scaling = self.raw.get("rope_scaling") or parameters or None
        if scaling is not None and str(scaling.get("rope_type", scaling.get("type", "default"))) == "default":
            scaling = None
        return theta, scaling

    def quantization(self) -> Quantization | None:
        """What ``quantization_config`` says. Whether such weights can be loaded is for who opens them to say."""
        raw = self.raw.get("quantization_config")
        if raw is None:
            return None
        if not isinstance(raw, Mapping) or not isinstance(raw.get("quant_method"), str):
            raise CheckpointError(f"{self.where}: quantization_config is {raw!r}, which names no quant_method")
        block = raw.get("weight_block_size")
        if block is None:
            return Quantization(quant_method=raw["quant_method"])
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise CheckpointError(
                f"{self.where}: weight_block_size is {block!r}, where two whole numbers (rows, columns) are needed"
            )
        return Quantization(quant_method=raw["quant_method"], weight_block_size=(block[0], block[1]))

    def mla(self) -> MLA:
        if self.raw.get("attention_bias"):
            raise ConfigError(f"{self.where}: attention_bias is set, which narrows does not support for MLA models")
        return MLA(
            q_lora_rank=self.count("q_lora_rank") if self.raw.get("q_lora_rank") is not None else None,
            kv_lora_rank=self.count("kv_lora_rank"),
            qk_nope_head_dim=self.count("qk_nope_head_dim"),
            qk_rope_head_dim=self.count("qk_rope_head_dim"),
            v_head_dim=self.count("v_head_dim"),
        )

    def gqa(self, model_type: str) -> GQA:
        heads, kv_heads = self.integer("num_attention_heads"), self.integer("num_key_value_heads", default=0)
        if kv_heads and heads % kv_heads:
            raise CheckpointError(
                f"{self.where}: {heads} attention heads do not divide into groups for {kv_heads} key-value heads"
            )
        bias = bool(self.raw.get("attention_bias", False))
        partial = self.raw.get("partial_rotary_factor") or (self.raw.get("rope_parameters") or {}).get(
            "partial_rotary_factor", 1.0
        )
        return GQA(
            num_key_value_heads=kv_heads or heads,
            head_dim=self.integer("head_dim", default=self.integer("hidden_size") // max(heads, 1)),
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias and model_type in ("llama", "qwen3", "qwen3_moe"),
            qk_norm=model_type in ("qwen3", "qwen3_moe") or bool(self.raw.get("use_qk_norm", False)),
            partial_rotary_factor=float(partial),
        )

    def moe(self, model_type: str) -> MoE | None:
        if model_type not in ("deepseek_v2", "deepseek_v3", "qwen3_moe", "glm4_moe"):
            return None
        if model_type == "deepseek_v2" and self.raw.get("n_routed_experts") is None:
            return None
        if self.raw.get("mlp_only_layers") or self.raw.get("decoder_sparse_step", 1) != 1:
            raise ConfigError(f"{self.where}: mlp_only_layers and decoder_sparse_step other than 1 are not supported")
        if self.raw.get("moe_layer_freq", 1) != 1:
            raise ConfigError(f"{self.where}: moe_layer_freq {self.raw['moe_layer_freq']} is not supported; only 1 is")
        sigmoid = model_type in ("deepseek_v3", "glm4_moe")
        scoring = str(self.raw.get("scoring_func") or ("sigmoid" if sigmoid else "softmax"))
        method = str(self.raw.get("topk_method") or ("noaux_tc" if sigmoid else "greedy"))
        if scoring not in ("softmax", "sigmoid") or method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ConfigError(
                f"{self.where}: routing {scoring!r} with {method!r} is not known; narrows routes softmax or sigmoid "
                "scores by greedy, group_limited_greedy or noaux_tc"
            )
        experts = self.integer("n_routed_experts", "num_local_experts", "num_experts")
        num_groups = self.integer("n_group", default=1) or 1
        if experts % num_groups:
            raise CheckpointError(f"{self.where}: {experts} experts do not divide into n_group {num_groups} groups")
        top_k = self.integer("num_experts_per_tok")
        topk_group = self.integer("topk_group", default=1) or 1
        if not 0 < top_k <= experts or not 0 < topk_group <= num_groups:
            raise CheckpointError(
                f"{self.where}: a row cannot go to {top_k} of {experts} experts in {topk_group} of {num_groups} groups"
            )
        return MoE(
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=self.integer("moe_intermediate_size"),
            n_shared_experts=self.integer("n_shared_experts", default=0),
            first_k_dense_replace=self.integer("first_k_dense_replace", default=0),
            scoring_func=scoring,
            topk_method=method,
            n_group=num_groups,
            topk_group=topk_group,
            # transformers' V2 router scales and never normalises, whatever its config says
            norm_topk_prob=model_type != "deepseek_v2" and bool(self.raw.get("norm_topk_prob", False)),
            routed_scaling_factor=self.number("routed_scaling_factor", 1.0),
        )
