"""What the schemas read and no model computes yet. A line goes when its computation comes."""

from __future__ import annotations

from narrows.arch.configs.shown import shown
from narrows.arch.model import MLA, ModelConfig
from narrows.errors import ConfigError

__all__ = ["check_computed"]


def check_computed(config: ModelConfig) -> None:
    """Refuse variants that would be computed wrongly.

    Raises:
        ConfigError: naming the field and the value that is computed.
    """
    attention, moe, rope = config.attention, config.moe, config.rope
    if config.hidden_act != "silu":
        raise ConfigError(f"hidden_act {shown(config.hidden_act)} is not supported; only silu is")
    if rope.scaling is not None and rope.scaling.rope_type in ("dynamic", "longrope"):
        raise ConfigError(
            f"rope_type {shown(rope.scaling.rope_type)} is not supported: it changes with the request's length"
        )
    if isinstance(attention, MLA):
        if attention.attention_bias:
            raise ConfigError("attention_bias is set, which narrows does not support for MLA models")
        if not rope.interleaved:
            raise ConfigError("rope_interleave is false, which narrows does not support; only true is")
    elif attention.sliding_window is not None:
        raise ConfigError(
            f"sliding_window is {attention.sliding_window} in {len(attention.sliding_layers)} layers; narrows attends "
            "to the whole context only"
        )
    if moe is None:
        return
    if config.mlp_bias and moe.n_shared_experts:
        raise ConfigError("mlp_bias is set, which narrows does not support with shared experts")
    if moe.moe_layer_freq != 1:
        raise ConfigError(f"moe_layer_freq {moe.moe_layer_freq} is not supported; only 1 is")
    if moe.decoder_sparse_step != 1 or moe.mlp_only_layers:
        raise ConfigError("mlp_only_layers and decoder_sparse_step other than 1 are not supported")
