"""Rows as one byte per value and a scale per row, and back: what a gather carries where the plan encodes rows.

The numbers are the same on every device, so ranks that decode the same bytes hold the same bits.

Letters: T rows, H columns.
"""

import torch
from torch import Tensor

from narrows.ops.compiled import kernels

__all__ = ["decode_rows", "decode_rows_reference", "encode_rows", "encode_rows_reference"]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude that a code stands for, by dtype."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scales below are no normal numbers, and some devices round those to 0."""
_COMPILED = (torch.bfloat16, torch.float32)


def encode_rows(x_TH: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``scale = max |x| / largest`` per row and ``codes = round(x / scale)``: returns ``(codes, scales)``.

    Shapes: x [T, H], bf16 or float32, H at least 1 -> codes [T, H] in ``dtype`` (int8, largest 127; float8_e4m3fn,
    largest 448), scales [T, 1] float32. Computed in float32, rounded to nearest, ties to even. What `decode_rows`
    gives back is off by at most scale / 2 in int8, and in fp8 by 1/16 of the value or scale / 1024, whichever is
    larger; then it is rounded to its dtype. Where the scale would be no normal number (all magnitudes below about
    1e-36 in int8) it is 0, and so is the row. A row with an infinity or a NaN has the scale NaN and comes back all
    NaN: what went wrong must not look finite.
    """
    compiled = kernels()
    if compiled is None or dtype is not torch.int8 or not _compiled(x_TH, out):
        return encode_rows_reference(x_TH, dtype, out=out)
    num_rows, width = x_TH.shape
    codes_TH = torch.empty((num_rows, width), dtype=dtype) if out is None else out
    assert codes_TH.shape == x_TH.shape and codes_TH.dtype == dtype
    scale_T1 = torch.empty((num_rows, 1), dtype=torch.float32)
    compiled.encode_rows(
        codes_TH.data_ptr(),
        scale_T1.data_ptr(),
        x_TH.data_ptr(),
        x_TH.stride(0),
        num_rows,
        width,
        x_TH.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return codes_TH, scale_T1


def encode_rows_reference(x_TH: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of `encode_rows`, and its path on other devices and for fp8; the same bits."""
    largest = _LARGEST[dtype]
    most_T1 = x_TH.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    scale_T1 = most_T1 / torch.full_like(most_T1, largest)  # by a plain number CUDA would multiply by its reciprocal
    scale_T1.masked_fill_(scale_T1 < _SMALLEST_SCALE, 0.0).masked_fill_(most_T1.isinf(), float("nan"))
    none_T1 = (scale_T1 > 0).logical_not_()
    codes_TH = torch.div(x_TH, scale_T1.masked_fill(none_T1, 1.0)).masked_fill_(none_T1, 0.0)
    if dtype is torch.int8:
        codes_TH.round_()
    codes_TH = codes_TH.clamp_(-largest, largest).to(dtype)
    return codes_TH if out is None else out.copy_(codes_TH), scale_T1


def decode_rows(codes_TH: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale``, in float32 and rounded to ``dtype``.

    Shapes: codes [T, H] int8 or float8_e4m3fn, scales [T, 1] float32 -> [T, H] in ``dtype`` (bf16 or float32).
    """
    compiled = kernels()
    if (
        compiled is None
        or codes_TH.dtype is not torch.int8
        or dtype not in _COMPILED
        or not (codes_TH.is_cpu and codes_TH.is_contiguous() and scale_T1.is_contiguous())
    ):
        return decode_rows_reference(codes_TH, scale_T1, dtype)
    num_rows, width = codes_TH.shape
    x_TH = torch.empty((num_rows, width), dtype=dtype)
    compiled.decode_rows(
        x_TH.data_ptr(),
        codes_TH.data_ptr(),
        scale_T1.data_ptr(),
        num_rows,
        width,
        dtype == torch.float32,
        torch.get_num_threads(),
    )
    return x_TH


def decode_rows_reference(codes_TH: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of `decode_rows`, and its path on other devices and for fp8; the same bits."""
    return (codes_TH.to(torch.float32) * scale_T1).to(dtype)


def _compiled(x_TH: Tensor, out: Tensor | None) -> bool:
    """Whether the compiled encoder takes these: on CPU, columns side by side."""
    return (
        x_TH.is_cpu
        and x_TH.dtype in _COMPILED
        and x_TH.stride(-1) == 1
        and (out is None or (out.is_cpu and out.is_contiguous()))
    )
