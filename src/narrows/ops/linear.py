"""Matrix product with a weight in the checkpoint's [out, in] order.

Knows two tensors and a bias. Does not know whether the weight is a shard, nor whether the result is a sum still owed.

Letters: T rows, I inputs, O outputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["linear", "linear_reference", "padded_rows"]

MIN_ROWS = 4
"""Rows from which on every row of a product is computed alike. MKL takes another kernel for float32 products of 1 to 3
rows, torch for bf16 ones of 1 row."""

MIN_PRODUCTS = 16**3 + 1
"""Multiplications from which on torch hands bf16 products to oneDNN (torch 2.13, ``mkldnn_gemm_min_size``)."""


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x @ weight^T + bias``.

    Shapes: x [T, I], weight [O, I], bias [O] or None -> [T, O]. All of one dtype, which is also the result's. On CPU
    ``mm`` into ``out`` and ``functional.linear`` take the same time and give the same bits (measured: 2048 x 1408, 1
    to 256 rows), so ``out`` costs nothing and saves the copy into a collective's buffer.

    ``batch_invariant``: the bits of a row do not depend on how many rows there are, nor on which: few rows are filled
    up with zeros (`padded_rows`). One row in float32 then takes up to twice the time (it is 4 rows, and no longer a
    product of a matrix and a vector), 2 or 3 take what they took or less; in bf16 there is no difference to measure.
    That the kernels are such is checked by a test of every product here, on the machine that runs it; it is not what
    MKL or oneDNN promise.
    Source: ``torch.nn.functional.linear``.
    """
    if batch_invariant:
        num_rows = x_TI.shape[0]
        x_TI = padded_rows(x_TI, *weight_OI.shape)
        if x_TI.shape[0] > num_rows:
            y_TO = functional.linear(x_TI, weight_OI, bias_O)[:num_rows]
            return y_TO if out is None else out.copy_(y_TO)
    if out is None:
        return functional.linear(x_TI, weight_OI, bias_O)
    if bias_O is None:
        return torch.mm(x_TI, weight_OI.t(), out=out)
    return torch.addmm(bias_O, x_TI, weight_OI.t(), out=out)


def padded_rows(x_T: Tensor, num_inputs: int, num_outputs: int) -> Tensor:
    """``x`` with rows of zeros behind it, as many as make its product with [inputs, outputs] one of many rows.

    Shapes: x [T, ...] -> [max(T, M), ...]; itself if there are enough already, or none.
    """
    num_rows = x_T.shape[0]
    missing = max(MIN_ROWS, -(-MIN_PRODUCTS // max(1, num_inputs * num_outputs))) - num_rows
    if num_rows == 0 or missing <= 0:
        return x_T
    return torch.cat((x_T, x_T.new_zeros((missing, *x_T.shape[1:]))))


def linear_reference(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Twin of `linear`, which promises nothing about bits."""
    y_TO = functional.linear(x_TI, weight_OI, bias_O)
    return y_TO if out is None else out.copy_(y_TO)
