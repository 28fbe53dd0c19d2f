"""Products of 16-bit matrices whose sums stay in float32, as tensor cores take them.

Products of two 16-bit numbers are exact in float32, so that widening both factors first gives the same products, and
sums that differ by their order. A GPU multiplies in float32 at a tenth of the rate or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide_bmm", "wide_mm"]


def wide_mm(x_TI: Tensor, weight_IO: Tensor) -> Tensor:
    """``x @ weight`` in float32 (float64 for float64), of factors of one dtype: [T, I], [I, O] -> [T, O]."""
    if _is_native(x_TI):
        return torch.mm(x_TI, weight_IO, out_dtype=torch.float32)
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    return torch.mm(x_TI.to(wide), weight_IO.to(wide))


def wide_bmm(x_BTI: Tensor, y_BIO: Tensor) -> Tensor:
    """The same per batch: [B, T, I], [B, I, O] -> [B, T, O]."""
    if _is_native(x_BTI):
        return torch.bmm(x_BTI, y_BIO, out_dtype=torch.float32)
    wide = torch.promote_types(x_BTI.dtype, torch.float32)
    return torch.bmm(x_BTI.to(wide), y_BIO.to(wide))


def _is_native(x: Tensor) -> bool:
    """Whether torch has such a product of these (it has none on CPU)."""
    return x.device.type == "cuda" and x.dtype.itemsize == 2
