"""How a checkpoint stores its weights: ``quantization_config`` and ``dtype``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from narrows.arch.configs.shown import shown
from narrows.arch.model import CheckpointQuantization
from narrows.errors import CheckpointError

__all__ = ["DTYPES", "OTHER_NAMES", "read_dtype", "read_quantization"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
"""The valid names of ``dtype``."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType({"compression_config": "compressed-tensors", "quantization": "mlx"})
"""Where older compressed-tensors and MLX say how they store weights."""


def read_dtype(raw: Mapping[str, Any]) -> str:
    """The dtype of the checkpoint's weights that are not quantised; bfloat16 where ``config.json`` does not say.

    Raises:
        CheckpointError: no dtype, or ``dtype`` and ``torch_dtype`` name two.
    """
    given = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    names: dict[str, str] = {}
    for key, value in given.items():
        names[key] = value.removeprefix("torch.") if isinstance(value, str) else ""
        if names[key] not in DTYPES:
            raise CheckpointError(f"{key} is {shown(value)}, where one of {', '.join(DTYPES)} is needed")
    if len(set(names.values())) > 1:
        raise CheckpointError(
            f"dtype is {names['dtype']} and torch_dtype {names['torch_dtype']}; leave one of them out"
        )
    return next(iter(names.values()), "bfloat16")


def read_quantization(raw: Mapping[str, Any]) -> CheckpointQuantization | None:
    """The quantization of ``quantization_config``, or of one of its other names. The loader decides whether it can
    load such weights.

    Raises:
        CheckpointError: it names no method, or an invalid block size.
    """
    for field, method in OTHER_NAMES.items():
        if raw.get(field) not in (None, {}):
            return CheckpointQuantization(quant_method=method)
    given = raw.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping) or not isinstance(given.get("quant_method"), str):
        raise CheckpointError(f"quantization_config is {shown(given)}, which names no quant_method")
    block = given.get("weight_block_size")
    if block is None:
        return CheckpointQuantization(quant_method=given["quant_method"])
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"weight_block_size is {shown(block)}, where two whole numbers (rows, columns) are needed"
        )
    return CheckpointQuantization(quant_method=given["quant_method"], weight_block_size=(block[0], block[1]))
