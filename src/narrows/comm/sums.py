"""The one way in which addends are summed on CPU, so that every collective that takes a sum takes the same bits.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sum_rows"]


def sum_rows(parts: Sequence[Tensor], start: int, rows: int, addends: Sequence[Tensor] = ()) -> Tensor:
    """``((part_0 + part_1) + ...) + addend_0 + ...`` in float32, rounded once to the dtype of the parts.

    Args:
        parts: each ``[T, W]``; their rows ``start .. start + rows - 1`` are summed. Not written.
        addends: each ``[rows, W]``, of any floating dtype.

    Returns:
        ``[rows, W]``, fresh memory.
    """
    first = parts[0]
    if not rows:  # common in decoding: 1 row on 8 ranks leaves nothing to add on 7 of them
        return first.new_empty((0, first.shape[1]))
    total = first.narrow(0, start, rows).to(torch.float32, copy=True)  # float32 too: this may be a peer's memory
    for part in parts[1:]:
        total.add_(part.narrow(0, start, rows))
    for addend in addends:
        total.add_(addend)
    return total.to(first.dtype)
