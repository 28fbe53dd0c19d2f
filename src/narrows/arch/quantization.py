"""Whether narrows reads the way in which a checkpoint stores its weights: one answer for planner and loader."""

from __future__ import annotations

from narrows.arch.config import CheckpointQuantization
from narrows.errors import ConfigError

__all__ = ["check_loadable", "is_block_fp8"]


def is_block_fp8(quantization: CheckpointQuantization | None) -> bool:
    """FP8 values with one scale per block, as DeepSeek-V3 is published."""
    return (
        quantization is not None and quantization.quant_method == "fp8" and quantization.weight_block_size is not None
    )


def check_loadable(quantization: CheckpointQuantization | None, name: str) -> None:
    """Refuse a quantisation that is not read here; ``name`` is the model's.

    Raises:
        ConfigError: naming the one that is.
    """
    if quantization is None or is_block_fp8(quantization):
        return
    method = repr(quantization.quant_method)
    if quantization.quant_method == "fp8":
        method += " without weight_block_size (one scale per tensor or channel)"
    raise ConfigError(
        f"{name}: its weights are quantised by {method}; supported: none, or 'fp8' with a weight_block_size such as "
        "[128, 128] (DeepSeek's) in quantization_config; take the unquantised checkpoint, or a GGUF file of the model"
    )
