"""Several fields, or columns, gathered by a transport that can gather one matrix of rows.

Knows tensors and row counts; moves nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["gather_as_rows", "gather_packed"]

Gather = Callable[[Tensor, Sequence[int]], Tensor]


def gather_packed(gather: Gather, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Several fields travel as one matrix of bytes: row by row, the fields side by side."""
    if len(xs) == 1:
        return [gather(xs[0], counts)]
    widths = [x.shape[1] * x.itemsize for x in xs]
    rows = [_as(x.contiguous(), torch.uint8, width) for x, width in zip(xs, widths, strict=True)]
    packed = gather(torch.cat(rows, dim=1), counts)
    parts = torch.split(packed, widths, dim=1)
    return [_as(_owned(part), x.dtype, x.shape[1]) for part, x in zip(parts, xs, strict=True)]


def gather_as_rows(gather: Gather, x: Tensor, widths: Sequence[int]) -> Tensor:
    """The columns of all members, ``[T, widths[me]]`` -> ``[T, sum(widths)]``: each travels as rows of one number."""
    rows = x.shape[0]
    sizes = [rows * width for width in widths]
    pieces = torch.split(gather(x.reshape(-1), sizes), sizes)
    return torch.cat([piece.view(rows, width) for piece, width in zip(pieces, widths, strict=True)], dim=1)


def _as(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """The memory of a contiguous matrix as another dtype; also of no columns, which ``view`` does not take."""
    return x.view(-1).view(dtype).view(x.shape[0], width)


def _owned(part: Tensor) -> Tensor:
    """A copy, also where ``contiguous`` would make none."""
    return part.clone(memory_format=torch.contiguous_format)
