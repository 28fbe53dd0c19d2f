"""FP8 block-scaled weights: which scales a slice needs, and the product.

A tensor [N, K] of float8 values has a tensor of scales [B, C]: one for each block of R x S values (128 x 128 in
DeepSeek-V3), the last row and column of blocks cut off where N and K end. The weight is ``value * scale``; the field's
name for the scales, ``weight_scale_inv``, is the inverse of what the quantiser multiplied by.
A slice need not begin or end where a block does.

Source of the arithmetic: DeepSeek-V3's own ``weight_dequant`` (product in float32, rounded once).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["covering_blocks", "dequantize_blocks", "scale_shape"]


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """[B, C] of a tensor [N, K].

    >>> scale_shape((576, 7168), (128, 128))
    (5, 56)
    """
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def covering_blocks(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The blocks of ``size`` that cover a span.

    >>> covering_blocks((100, 300), 128), covering_blocks((128, 128), 128)
    ((0, 3), (1, 1))
    """
    return span[0] // size, -(-span[1] // size)


def dequantize_blocks(
    values_NK: Tensor, scale_BC: Tensor, block: tuple[int, int], start: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """``values * scale`` of a slice, in ``dtype``; one row of blocks at a time, so that little is held in float32.

    Args:
        scale_BC: the scales of the blocks that cover the slice.
        block: rows and columns of a block.
        start: row and column, within the first of these blocks, at which the slice begins.
    """
    num_rows, num_columns = values_NK.shape
    rows_per_block, columns_per_block = block
    out_NK = torch.empty((num_rows, num_columns), dtype=dtype)
    column_of_blocks_K = torch.arange(start[1], start[1] + num_columns) // columns_per_block
    scale_BK = scale_BC.to(torch.float32).index_select(1, column_of_blocks_K)
    row = 0
    for index in range(len(scale_BK)):
        stop = min((index + 1) * rows_per_block - start[0], num_rows)
        out_NK[row:stop] = values_NK[row:stop].to(torch.float32).mul_(scale_BK[index])
        row = stop
    return out_NK
