"""Rotary scaling in GGUF, as the ``rope_scaling`` of ``config.json``.

llama.cpp has types ``none``, ``linear``, ``yarn`` and ``longrope`` under ``rope.scaling.*``. It writes Llama 3's rule
as a tensor of factors by frequency (``rope_freqs.weight``), without the numbers that made them. Every published Llama 3
has the same three (`LLAMA3`), and the fourth is the largest factor; so the factors are made again from these, compared,
and refused if they differ.

DeepSeek's YaRN has ``mscale`` and ``mscale_all_dim``, of which GGUF keeps the second, times 0.1, as
``yarn_log_multiplier``; llama.cpp takes the first to be equal, as it is in every published DeepSeek and Kimi.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from narrows.convert.gguf_fields import Fields
from narrows.convert.gguf_header import GgufHeader
from narrows.errors import ConfigError

__all__ = ["ROPE_FACTORS", "rope_scaling"]

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = MappingProxyType({"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0})


def rope_scaling(fields: Fields, *, theta: float, rope_dim: int) -> dict[str, Any] | None:
    """The ``rope_scaling`` of a model that rotates ``rope_dim`` columns a head; None where there is none.

    Raises:
        ConfigError: a type, a number or a tensor of factors that narrows does not obey.
    """
    file = fields.file
    kind = file.get(fields.key("rope.scaling.type"), str, "linear")
    old = "rope.scale_linear" if fields.has("rope.scale_linear") else None
    factor = fields.number("rope.scaling.factor", 0.0) or (fields.number(old) if old else 0.0) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise fields.refuse("rope.scaling.type", "supported: 'none', 'linear', 'yarn', or Llama 3's by tensor")
    if factor <= 0:
        raise fields.refuse(old or "rope.scaling.factor", "it must be above 0")
    scaling = None
    if kind == "yarn":
        scaling = _yarn(fields, factor)
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
        if fields.arch == "deepseek2":
            raise fields.refuse("rope.scaling.factor", "supported for deepseek2: YaRN ('yarn'), or none")
    if kind != "yarn":
        _neutral(fields, "rope.scaling.attn_factor", 1.0)
        _neutral(fields, "rope.scaling.yarn_ext_factor", 0.0, -1.0)
    if fields.arch != "llama" or ROPE_FACTORS not in file.tensors:
        return scaling
    return _llama3(file, scaling, theta, rope_dim)


def _yarn(fields: Fields, factor: float) -> dict[str, Any] | None:
    _neutral(fields, "rope.scaling.yarn_ext_factor", 1.0, -1.0)
    usual = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    given = fields.number("rope.scaling.yarn_attn_factor", usual)
    if not math.isclose(given, usual, rel_tol=1e-5):
        raise fields.refuse(
            "rope.scaling.yarn_attn_factor",
            f"llama.cpp computes 0.1 ln(factor) + 1 = {usual:g} whatever it says; supported: that, or none",
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.count(
            "rope.scaling.original_context_length", fields.count("context_length")
        ),
        "beta_fast": fields.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.positive("rope.scaling.yarn_beta_slow", 1.0),
    }
    multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    if fields.arch == "deepseek2":
        _neutral(fields, "rope.scaling.attn_factor", 1.0)
        if multiplier <= 0:
            raise ConfigError(
                f"{fields.file.path} scales its rotary positions by YaRN without "
                f"{fields.key('rope.scaling.yarn_log_multiplier')}: llama.cpp and DeepSeek's own code scale attention "
                "differently then; supported: files that give it (0.1 times mscale_all_dim), as all published ones do"
            )
        mscale = float(f"{10 * multiplier:.6g}")
        return scaling | {"mscale": mscale, "mscale_all_dim": mscale}
    if multiplier != 0:
        raise fields.refuse("rope.scaling.yarn_log_multiplier", "supported outside deepseek2: 0, or none")
    attention = fields.positive("rope.scaling.attn_factor", 1.0)
    return scaling if attention == 1.0 else scaling | {"attention_factor": usual * attention}


def _neutral(fields: Fields, field: str, *values: float) -> None:
    if fields.number(field, values[0]) not in values:
        raise fields.refuse(field, f"supported: {' or '.join(f'{value:g}' for value in values)}, or none")


def _llama3(file: GgufHeader, scaling: dict[str, Any] | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    found = file.floats(ROPE_FACTORS)
    if found and all(factor == 1.0 for factor in found):
        return scaling
    if scaling is not None:
        raise ConfigError(
            f"{file.path} scales its rotary positions twice, by {scaling['rope_type']} and by {ROPE_FACTORS}; "
            "supported: one of them"
        )
    made = {"rope_type": "llama3", "factor": max(found, default=0.0), **LLAMA3}
    factors = _llama3_factors(made, theta, head_dim)
    if len(found) != len(factors) or not all(
        math.isclose(f, m, rel_tol=1e-4) for f, m in zip(found, factors, strict=True)
    ):
        raise ConfigError(
            f"{file.path} scales its rotary positions by {len(found)} factors up to {max(found, default=0.0):g} "
            f"({ROPE_FACTORS}) that are not Llama 3's rule for heads of {head_dim}; supported: none, or Llama 3's"
        )
    return made


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """What each frequency is divided by, as llama.cpp's converter computes it from ``config.json``."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (i / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept) if factor else math.inf)
    return factors
