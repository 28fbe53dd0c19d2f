"""Sums on CPU, taken in one way, so that every collective gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["float32_sum", "sum_rows"]


def float32_sum(parts: Sequence[Tensor], start: int, rows: int) -> Tensor:
    """``(part_0 + part_1) + ...`` in float32, not rounded: rows ``start .. start + rows - 1`` of the ``[T, W]`` parts.

    Returns:
        ``[rows, W]`` float32, fresh memory; the parts are not written.
    """
    total = parts[0].narrow(0, start, rows).to(torch.float32, copy=True)  # float32 too: it may be a peer's memory
    if rows:  # nothing to add is common in decoding: 1 row on 8 ranks
        for part in parts[1:]:
            total.add_(part.narrow(0, start, rows))
    return total


def sum_rows(parts: Sequence[Tensor], start: int, rows: int, addends: Sequence[Tensor] = ()) -> Tensor:
    """:func:`float32_sum`, then ``+ addend_0 + ...`` (each ``[rows, W]``), rounded once to the dtype of the parts.

    Returns:
        ``[rows, W]``, fresh memory.
    """
    total = float32_sum(parts, start, rows)
    for addend in addends:
        total.add_(addend)
    return total.to(parts[0].dtype)
