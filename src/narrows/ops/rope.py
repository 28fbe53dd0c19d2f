"""Rotary position embedding: frequencies, table, rotation, and the softmax scale that YaRN changes.

The caller passes exactly the columns to rotate, and ``dim`` is their number; so it applies ``partial_rotary_factor``.

Letters: T rows, P positions in the table, N heads, D rotated columns per head, ``D2`` = D / 2.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from narrows.errors import ConfigError
from narrows.ops.compiled import kernels

__all__ = [
    "apply_rope",
    "apply_rope_reference",
    "compiled_types",
    "dynamic_base",
    "mla_softmax_scale",
    "rope_inverse_frequencies",
    "rope_table",
]

KNOWN_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")

MOST_COLUMNS = 1024
"""Rotated columns per head up to which the compiled rotation keeps a head (csrc/kernels/rope.cpp)."""


def rope_inverse_frequencies(
    dim: int, theta: float, *, scaling: Mapping[str, object] | None, max_position: int, length: int = 0
) -> tuple[Tensor, float]:
    """``1 / theta^(2i / dim)`` for i < dim / 2, rescaled as the checkpoint asks, and the factor on cos and sin.

    ``dim``: rotated columns per head; ``scaling``: the ``rope_scaling`` or ``rope_parameters`` dictionary of
    config.json (its ``rope_type`` or, in older files, ``type`` says which rule), or None; ``theta`` and
    ``max_position``: the config's ``rope_theta`` and ``max_position_embeddings``, in positions; ``length``: tokens of
    the sequence, for the types that depend on it. Returns (float32 [dim / 2] on CPU, float).

    - ``default``: as above; ``linear``: divided by ``factor``.
    - ``llama3``: wavelengths above ``original / low_freq_factor`` divided by ``factor``, below
      ``original / high_freq_factor`` kept, between them blended.
    - ``yarn``: a ramp over the columns between kept (fast) and divided by ``factor`` (slow), its ends where a column
      turns ``beta_fast`` and ``beta_slow`` times in the original context; rounded outwards unless ``truncate`` is
      false. Factor on cos and sin: ``attention_factor``, else ``m(mscale) / m(mscale_all_dim)``, else ``m(1)``, with
      ``m(s) = 0.1 s ln(factor) + 1``.

    - ``dynamic``: in sequences longer than ``max_position`` the base grows with the length (:func:`dynamic_base`).
    - ``longrope``: each column divided by its own factor, of ``long_factor`` in sequences longer than ``original``,
      else of ``short_factor``. Factor on cos and sin, at any length: ``attention_factor``, else
      ``sqrt(1 + ln(factor) / ln(original))``, 1 for a factor <= 1.

    Errors: `ConfigError` for any other type and for a missing number.
    Source: Su et al. (2021); Peng et al., "YaRN" (2023); transformers ``ROPE_INIT_FUNCTIONS``, to the bit.
    """
    rope_type = _rope_type(scaling)
    exponent_D2 = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    pos_freqs_D2 = theta**exponent_D2
    inv_freq_D2 = 1.0 / pos_freqs_D2
    if scaling is None or rope_type == "default":
        return inv_freq_D2, 1.0
    if rope_type == "dynamic":
        return 1.0 / dynamic_base(dim, theta, scaling, max_position, torch.tensor(length)) ** exponent_D2, 1.0
    if rope_type == "linear":
        return inv_freq_D2 / _number(scaling, "factor"), 1.0
    original = _number(scaling, "original_max_position_embeddings", default=max_position)
    if rope_type == "llama3":
        return _llama3(inv_freq_D2, scaling, original), 1.0
    factor = _number(scaling, "factor", default=max_position / original)
    if rope_type == "longrope":
        by_column_D2 = _factors(scaling, "long_factor" if length > original else "short_factor", dim // 2)
        return 1.0 / (by_column_D2 * pos_freqs_D2), _long_attention_factor(scaling, factor, original)
    return _yarn(pos_freqs_D2, scaling, theta, factor, original), _yarn_attention_factor(scaling, factor)


def dynamic_base(dim: int, theta: float, scaling: Mapping[str, object], max_position: int, lengths: Tensor) -> Tensor:
    """The base of ``dynamic`` for sequences of ``lengths`` tokens (int64, any shape), float32 of that shape.

    ``theta (factor l / max_position - (factor - 1))^(dim / (dim - 2))`` with l the length, at least ``max_position``.
    Source: "NTK-aware" scaling by length, transformers ``_compute_dynamic_ntk_parameters``.
    """
    if dim <= 2:
        raise ConfigError(f"rope type 'dynamic' needs more than 2 rotated columns per head, got {dim}")
    factor = _number(scaling, "factor")
    longer = lengths.clamp(min=max_position).to(torch.float32)
    return theta * (factor * longer / max_position - (factor - 1)) ** (dim / (dim - 2))


def rope_table(
    inv_freq_D2: Tensor, attention_factor: float, num_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``cos(p * inv_freq) * attention_factor`` and the same of sin, for positions p = 0 .. num_positions - 1.

    Shapes: inv_freq [D/2] float32 -> two [P, D/2] of ``dtype`` on its device; computed in float32 and rounded once.
    transformers rotates in the model's dtype with cos and sin rounded to it (Llama, Qwen, DeepSeek V3) but in float32
    for DeepSeek V2: ``dtype`` chooses, see `apply_rope`.
    """
    positions_P = torch.arange(num_positions, dtype=torch.float32, device=inv_freq_D2.device)
    angles_PD2 = positions_P[:, None] * inv_freq_D2.to(torch.float32)
    return (angles_PD2.cos() * attention_factor).to(dtype), (angles_PD2.sin() * attention_factor).to(dtype)


def apply_rope(
    x_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor, *, interleaved: bool, out: Tensor | None = None
) -> Tensor:
    """``(a cos - b sin, b cos + a sin)`` for every pair (a, b) of a head's columns.

    Shapes: x [T, N, D] (any strides), cos and sin [T, D/2], the table's rows at the rows' positions -> [T, N, D] in x's
    dtype. Pairs: ``interleaved`` (0, 1), (2, 3), ...; else (i, i + D/2).

    The result is ALWAYS in halves: first members in columns 0 .. D/2 - 1, second ones behind. That is what
    transformers leaves for Llama, Qwen and DeepSeek V3; for DeepSeek V2 it leaves the pairs in place. Scores do not
    depend on it as long as queries and keys agree, and the cache holds only keys rotated here. The arithmetic is in
    the wider of the dtypes of x and the table, rounded to x's dtype at the end: a table in x's dtype gives
    transformers' bits for Llama, Qwen and V3, one in float32 those of V2. ``out`` may be ``x_TND``.
    """
    compiled, types = kernels(), compiled_types(x_TND, cos_TD2, sin_TD2)
    if compiled is None or types is None or (out is not None and out.stride(-1) != 1):
        return _rotated_by_torch(x_TND, cos_TD2, sin_TD2, interleaved, out)
    if out is None:
        out = torch.empty(x_TND.shape, dtype=x_TND.dtype)
    assert out.shape == x_TND.shape and out.dtype == x_TND.dtype
    compiled.rope_rows(
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        x_TND.data_ptr(),
        x_TND.stride(0),
        x_TND.stride(1),
        cos_TD2.data_ptr(),
        sin_TD2.data_ptr(),
        *x_TND.shape[:2],
        x_TND.shape[2] // 2,
        interleaved,
        *types,
        torch.get_num_threads(),
    )
    return out


def apply_rope_reference(
    x_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor, *, interleaved: bool, out: Tensor | None = None
) -> Tensor:
    """Twin of `apply_rope`: bring the pairs into halves, then ``x cos + rotate_half(x) sin`` at full width."""
    if interleaved:
        x_TND = torch.unflatten(x_TND, -1, (-1, 2)).transpose(-1, -2).flatten(-2)
    a, b = x_TND.chunk(2, dim=-1)
    cos_T1D, sin_T1D = (torch.cat((half, half), dim=-1).unsqueeze(-2) for half in (cos_TD2, sin_TD2))
    y_TND = (x_TND * cos_T1D + torch.cat((-b, a), dim=-1) * sin_T1D).to(x_TND.dtype)
    return y_TND if out is None else out.copy_(y_TND)


def compiled_types(x_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> tuple[bool, bool] | None:
    """Whether x and whether the table is float32, for the compiled rotation; None if it takes them not."""
    fits = x_TND.dim() == 3 and x_TND.is_cpu and x_TND.stride(2) == 1 and x_TND.shape[2] <= MOST_COLUMNS
    types = x_TND.dtype == torch.float32, cos_TD2.dtype == torch.float32
    known = types[1] if types[0] else x_TND.dtype == torch.bfloat16 and cos_TD2.dtype in (torch.float32, torch.bfloat16)
    return types if fits and known and cos_TD2.is_contiguous() and sin_TD2.is_contiguous() else None


def _rotated_by_torch(x_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor, interleaved: bool, out: Tensor | None) -> Tensor:
    cos_T1D2, sin_T1D2 = cos_TD2.unsqueeze(-2), sin_TD2.unsqueeze(-2)
    half = x_TND.shape[-1] // 2
    if interleaved:
        # One copy: arithmetic on every second column is 3 times slower in bf16 (no vector loads).
        a, b = torch.unflatten(x_TND, -1, (half, 2)).movedim(-1, 0).contiguous()
    else:
        a, b = x_TND[..., :half], x_TND[..., half:]
    a_cos, b_sin, b_cos, a_sin = a * cos_T1D2, b * sin_T1D2, b * cos_T1D2, a * sin_T1D2
    if out is None:
        out = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device)
    torch.sub(a_cos, b_sin, out=out[..., :half])
    torch.add(b_cos, a_sin, out=out[..., half:])
    return out


def mla_softmax_scale(qk_head_dim: int, scaling: Mapping[str, object] | None) -> float:
    """``qk_head_dim^-0.5 * m^2``, ``m = 0.1 mscale_all_dim ln(factor) + 1`` or 1 where the checkpoint gives none.

    ``qk_head_dim``: columns of a query head, rotated ones included. One rule for DeepSeek V2 and V3 in transformers
    (``yarn_apply_mscale``), so there is no flag: m applies for every rope type but ``default`` if ``mscale_all_dim`` is
    there and not 0, and m = 1 for factor <= 1.
    """
    scale: float = qk_head_dim**-0.5
    if scaling is None or _rope_type(scaling) == "default" or not scaling.get("mscale_all_dim"):
        return scale
    mscale = _yarn_mscale(_number(scaling, "factor"), _number(scaling, "mscale_all_dim"))
    return scale * mscale * mscale


def _rope_type(scaling: Mapping[str, object] | None) -> str:
    if scaling is None:
        return "default"
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in KNOWN_TYPES:
        raise ConfigError(
            f"rope type {rope_type!r} is not supported: this engine knows {', '.join(KNOWN_TYPES)}"
            " (rope_scaling in config.json)"
        )
    return str(rope_type)


def _number(scaling: Mapping[str, object], key: str, *, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling of type {_rope_type(scaling)!r} needs a number for {key!r}, got {value!r}")
    return value


def _llama3(inv_freq_D2: Tensor, scaling: Mapping[str, object], original: float) -> Tensor:
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength_D2 = 2 * math.pi / inv_freq_D2
    is_long_D2, is_short_D2 = wavelength_D2 > original / low, wavelength_D2 < original / high
    blend_D2 = (original / wavelength_D2 - low) / (high - low)
    blended_D2 = (1 - blend_D2) * inv_freq_D2 / factor + blend_D2 * inv_freq_D2
    return torch.where(is_long_D2, inv_freq_D2 / factor, torch.where(is_short_D2, inv_freq_D2, blended_D2))


def _yarn(pos_freqs_D2: Tensor, scaling: Mapping[str, object], theta: float, factor: float, original: float) -> Tensor:
    num_freqs = pos_freqs_D2.shape[0]
    dim = 2 * num_freqs

    def column_that_turns(num_turns: float) -> float:
        return (dim * math.log(original / (num_turns * 2 * math.pi))) / (2 * math.log(theta))

    # `or`: transformers reads 0 as "not given" too.
    low = column_that_turns(_number(scaling, "beta_fast", default=32) or 32)
    high = column_that_turns(_number(scaling, "beta_slow", default=1) or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of width 0 would divide by 0
    ramp_D2 = ((torch.arange(num_freqs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_D2 = 1 - ramp_D2
    return 1.0 / (factor * pos_freqs_D2) * (1 - kept_D2) + 1.0 / pos_freqs_D2 * kept_D2


def _yarn_attention_factor(scaling: Mapping[str, object], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        mscale, mscale_all_dim = _number(scaling, "mscale"), _number(scaling, "mscale_all_dim")
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


def _factors(scaling: Mapping[str, object], key: str, num_columns: int) -> Tensor:
    value = scaling.get(key)
    if not isinstance(value, list | tuple) or len(value) != num_columns:
        raise ConfigError(f"rope_scaling of type 'longrope' needs {num_columns} numbers for {key!r}, got {value!r}")
    return torch.tensor(value, dtype=torch.float32)


def _long_attention_factor(scaling: Mapping[str, object], factor: float, original: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
