"""Matrix product with a weight in the checkpoint's [out, in] order, or packed for the CPU's bf16 products.

The weight may be a shard, and the result a sum that is still owed over ranks: the op is the same.

Letters: T rows, I inputs, O outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.blocks import BlockLinear, block_linear
from narrows.ops.compiled import Pair, brgemm, has_amx, has_avx512, kernels
from narrows.ops.int8 import Int8Linear, int8_linear
from narrows.ops.packed import LinearParts, LinearWeight, PackedLinear, plain

__all__ = ["linear", "linear_reference", "rows_alike"]

MIN_ROWS = {torch.float32: 16, torch.bfloat16: 4}
"""Rows from which on every row of a product is computed alike. MKL takes other kernels for float32 products of 1 to 3
rows on an AMD EPYC (Zen 4), of 1 to 15 on a Xeon (Ice Lake); torch for bf16 ones of 1 row."""

AMX_ROWS = 32
"""bf16 rows of one product on CPUs with AMX. From one number of rows to another, up to hundreds, oneDNN sums in other
orders there, so no number of rows is enough: every product is one of this many."""

AVX2_ROWS = 16
"""float32 rows of one product on CPUs without AVX-512, where MKL does the same. In products of 16 rows all positions
are alike; in products of 8 or 32 they are not."""

FEW_ROWS = 4
"""bf16 rows up to which a plain weight on CPU is read by the compiled product: at the speed of memory, torch at less
than half of it (docs/kernels.md)."""

MIN_PRODUCTS = 16**3 + 1
"""Multiplications from which on torch hands bf16 products to oneDNN (torch 2.13, ``mkldnn_gemm_min_size``)."""


def linear(
    x_TI: Tensor,
    weight_OI: LinearWeight,
    bias_O: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x @ weight^T + bias``.

    Shapes: x [T, I], weight [O, I], bias [O] or None -> [T, O]. All of one dtype, which is also the result's.

    A packed weight: summed in float32, bias added there, rounded once. Few rows take the time of reading the weight
    (docs/kernels.md). The order of a row's sum does not depend on the rows, except on CPUs with AMX, where many rows
    are left to torch's brgemm unless ``batch_invariant``. An int8 weight, packed or not: as `int8` says; one in blocks:
    as `blocks` says. Parts that are not held alike are so many products.

    A plain one: on CPU ``mm`` into ``out`` and ``functional.linear`` take the same time and give the same bits
    (measured: 2048 x 1408, 1 to 256 rows), so ``out`` costs nothing and saves the copy into a collective's buffer.

    ``batch_invariant``, of a plain weight: the bits of a row do not depend on how many rows there are, nor on which:
    few rows are filled up with zeros. Many rows are several products in bf16 with AMX, and in float32 without AVX-512
    (`rows_alike`). One row in float32 is then 16, and no longer a product of a matrix and a vector. 512 rows of
    2048 x 2048 take three times as long in bf16 with AMX, and 1.7 times in float32 without AVX-512 (docs/log.md).
    That the kernels are such is checked by a test of every product here, on the machine that runs it; it is not what
    MKL or oneDNN promise.
    Source: ``torch.nn.functional.linear``.
    """
    if isinstance(weight_OI, PackedLinear):
        return _packed_linear(x_TI, weight_OI, bias_O, out, None if batch_invariant else brgemm())
    if isinstance(weight_OI, LinearParts):
        return _of_parts(x_TI, weight_OI, bias_O, out, batch_invariant)
    if isinstance(weight_OI, Int8Linear | BlockLinear):
        y_TO = _twin(x_TI, weight_OI, bias_O)
        return y_TO if out is None else out.copy_(y_TO)
    if not batch_invariant and _few(x_TI, weight_OI, out):
        return _few_rows(x_TI, weight_OI, bias_O, out)
    if batch_invariant:
        y_TO = rows_alike(lambda x: functional.linear(x, weight_OI, bias_O), x_TI, *weight_OI.shape)
        return y_TO if out is None else out.copy_(y_TO)
    if out is None:
        return functional.linear(x_TI, weight_OI, bias_O)
    if bias_O is None:
        return torch.mm(x_TI, weight_OI.t(), out=out)
    return torch.addmm(bias_O, x_TI, weight_OI.t(), out=out)


def _twin(x_TI: Tensor, weight: Int8Linear | BlockLinear, bias_O: Tensor | None) -> Tensor:
    if isinstance(weight, Int8Linear):
        return int8_linear(x_TI, weight, bias_O)
    return block_linear(x_TI, weight, bias_O)


def _of_parts(
    x_TI: Tensor, weight: LinearParts, bias_O: Tensor | None, out: Tensor | None, batch_invariant: bool
) -> Tensor:
    y_TO = x_TI.new_empty((x_TI.shape[0], weight.shape[0])) if out is None else out
    for first, part in weight.at():
        stop = first + part.shape[0]
        bias = None if bias_O is None else bias_O[first:stop]
        linear(x_TI, part, bias, out=y_TO[:, first:stop], batch_invariant=batch_invariant)
    return y_TO


def rows_alike(product: Callable[[Tensor], Tensor], x_T: Tensor, num_inputs: int, num_outputs: int) -> Tensor:
    """``product(x)``, where the bits of a row depend neither on how many others there are nor on which.

    ``product`` is that of each row with [inputs, outputs]. It gets as many rows as have kernels that treat all alike:
    zeros behind them where there are fewer.

    Shapes: x [T, ...] -> [T, ...].
    """
    num_rows = x_T.shape[0]
    if num_rows == 0:
        return product(x_T)
    if (size := _block_rows(x_T)) is not None:
        blocks = [product(_filled(block, size)) for block in torch.split(x_T, size)]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[:num_rows]
    least = max(MIN_ROWS.get(x_T.dtype, 1), -(-MIN_PRODUCTS // max(1, num_inputs * num_outputs)))
    return product(_filled(x_T, least))[:num_rows]


def _block_rows(x_T: Tensor) -> int | None:
    """How many rows one product has where no number of rows treats all alike; None: as many as there are."""
    if x_T.is_cpu and x_T.dtype == torch.bfloat16 and has_amx():
        return AMX_ROWS
    if x_T.is_cpu and x_T.dtype == torch.float32 and not has_avx512():
        return AVX2_ROWS
    return None


def _filled(x_T: Tensor, num_rows: int) -> Tensor:
    """With zeros behind it, where there are fewer rows."""
    missing = num_rows - x_T.shape[0]
    return x_T if missing <= 0 else torch.cat((x_T, x_T.new_zeros((missing, *x_T.shape[1:]))))


def linear_reference(
    x_TI: Tensor,
    weight_OI: LinearWeight,
    bias_O: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Twin of `linear`, which promises nothing about bits."""
    y_TO = functional.linear(x_TI, plain(weight_OI).to(x_TI.dtype), bias_O)
    return y_TO if out is None else out.copy_(y_TO)


def _few(x_TI: Tensor, weight_OI: Tensor, out: Tensor | None) -> bool:
    """Whether these few bf16 rows and this plain weight are the compiled product's."""
    return (
        0 < x_TI.shape[0] <= FEW_ROWS
        and x_TI.dtype == torch.bfloat16
        and x_TI.is_cpu
        and x_TI.dim() == 2
        and x_TI.stride(1) == 1
        and weight_OI.is_contiguous()
        and (out is None or (out.stride(1) == 1 and out.dtype == torch.bfloat16))
        and kernels() is not None
    )


def _few_rows(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None) -> Tensor:
    compiled = kernels()
    assert compiled is not None and weight_OI.dtype == torch.bfloat16 and x_TI.shape[1] == weight_OI.shape[1]
    y_TO = torch.empty((x_TI.shape[0], weight_OI.shape[0]), dtype=torch.bfloat16) if out is None else out
    assert y_TO.shape == (x_TI.shape[0], weight_OI.shape[0]) and (bias_O is None or bias_O.dtype == torch.bfloat16)
    compiled.linear_few(
        y_TO.data_ptr(),
        y_TO.stride(0),
        x_TI.data_ptr(),
        x_TI.stride(0),
        weight_OI.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        *x_TI.shape[:1],
        *weight_OI.shape,
        torch.get_num_threads(),
    )
    return y_TO


def _packed_linear(
    x_TI: Tensor, weight: PackedLinear, bias_O: Tensor | None, out: Tensor | None, many: Pair | None
) -> Tensor:
    compiled = kernels()
    assert compiled is not None and not weight.gated and x_TI.dtype == torch.bfloat16
    num_rows, num_inputs = x_TI.shape
    assert num_inputs == weight.num_inputs, f"{num_inputs} columns, but a weight of {weight.num_inputs} inputs"
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    if out is not None and (out.stride(1) != 1 or out.dtype != torch.bfloat16):
        return out.copy_(_packed_linear(x_TI, weight, bias_O, None, many))
    y_TO = torch.empty((num_rows, weight.num_outputs), dtype=torch.bfloat16) if out is None else out
    assert y_TO.shape == (num_rows, weight.num_outputs) and (bias_O is None or bias_O.dtype == torch.bfloat16)
    compiled.linear(
        y_TO.data_ptr(),
        y_TO.stride(0),
        x_TI.data_ptr(),
        x_TI.stride(0),
        *weight.given,
        None if bias_O is None else bias_O.data_ptr(),
        num_rows,
        weight.num_outputs,
        num_inputs,
        0,
        torch.get_num_threads(),
        many,
    )
    return y_TO
