"""Token ids to rows of a table of which this tensor holds one range.

Over all ranks whose ranges cover the vocabulary the results add up to the embedding.

Letters: T rows, V ids held here, H columns.
"""

import torch
from torch import Tensor

from narrows.ops.blocks import BlockLinear, block_values
from narrows.ops.compiled import kernels
from narrows.ops.packed import PackedLinear, plain

__all__ = ["Table", "embedding", "embedding_reference"]

Table = Tensor | PackedLinear | BlockLinear
"""A plain table, or one in blocks, which is also the head."""


def embedding(ids_T: Tensor, weight_VH: Table, first_id: int, *, out: Tensor | None = None) -> Tensor:
    """``weight[id - first_id]`` where ``first_id <= id < first_id + V``, else zeros.

    Shapes: ids [T] int64, weight [V, H] -> [T, H] in the weight's dtype. V may be 0 (an uneven split leaves nothing
    here): all zeros. An id outside every range (a dead row's -1) is a row of zeros too; nothing is read outside the
    table. Of a table in blocks the rows asked for become numbers, in bf16.
    """
    if not isinstance(weight_VH, Tensor):
        return _of_blocks(ids_T, weight_VH, first_id, out)
    num_ids = weight_VH.shape[0]
    if num_ids == 0:
        shape = (ids_T.shape[0], weight_VH.shape[1])
        return weight_VH.new_zeros(shape) if out is None else out.zero_()
    compiled = kernels()
    if (
        compiled is not None
        and weight_VH.is_cpu
        and weight_VH.stride(1) == 1
        and weight_VH.stride(0) == weight_VH.shape[1]
        and ids_T.dtype == torch.int64
        and ids_T.is_contiguous()
        and (out is None or (out.stride(1) == 1 and out.dtype == weight_VH.dtype))
    ):
        if out is None:
            out = torch.empty((ids_T.shape[0], weight_VH.shape[1]), dtype=weight_VH.dtype)
        assert out.shape == (ids_T.shape[0], weight_VH.shape[1])
        size = weight_VH.element_size()
        compiled.embedding(
            out.data_ptr(),
            out.stride(0) * size,
            ids_T.data_ptr(),
            ids_T.shape[0],
            weight_VH.data_ptr(),
            first_id,
            num_ids,
            weight_VH.shape[1] * size,
        )
        return out
    local_T = ids_T - first_id
    elsewhere_T = (local_T < 0) | (local_T >= num_ids)
    y_TH = torch.index_select(weight_VH, 0, local_T.clamp_(0, num_ids - 1), out=out)
    # Not a product with 0: an infinity in the row that stands in for a foreign id would become a NaN.
    return y_TH.masked_fill_(elsewhere_T.unsqueeze(-1), 0)


def _of_blocks(ids_T: Tensor, table: PackedLinear | BlockLinear, first_id: int, out: Tensor | None) -> Tensor:
    num_ids, hidden = table.shape
    if isinstance(table, BlockLinear):
        local_T = ids_T - first_id
        elsewhere_T = (local_T < 0) | (local_T >= num_ids)
        rows_TH = torch.zeros((ids_T.shape[0], hidden), dtype=torch.bfloat16)
        here_X = (~elsewhere_T).nonzero().squeeze(1)
        rows_TH[here_X] = block_values(table.bytes_ON[local_T[here_X]], table.blocks).to(torch.bfloat16)
        return rows_TH if out is None else out.copy_(rows_TH)
    compiled = kernels()
    assert compiled is not None and table.blocks is not None and not table.gated
    if out is not None and (out.stride(1) != 1 or out.dtype != torch.bfloat16):
        return out.copy_(_of_blocks(ids_T, table, first_id, None))
    y_TH = torch.empty((ids_T.shape[0], hidden), dtype=torch.bfloat16) if out is None else out
    ids_T = ids_T.to(torch.int64).contiguous()
    kind, panels, _ = table.given
    compiled.embedding_blocks(
        y_TH.data_ptr(), y_TH.stride(0), ids_T.data_ptr(), ids_T.shape[0], panels, kind, first_id, num_ids, hidden
    )
    return y_TH


def embedding_reference(ids_T: Tensor, weight_VH: Table, first_id: int, *, out: Tensor | None = None) -> Tensor:
    """Twin of `embedding`, row by row."""
    if not isinstance(weight_VH, Tensor):
        weight_VH = plain(weight_VH).to(torch.bfloat16)
    y_TH = weight_VH.new_zeros((ids_T.shape[0], weight_VH.shape[1]))
    for row, token in enumerate(ids_T.tolist()):
        if first_id <= token < first_id + weight_VH.shape[0]:
            y_TH[row] = weight_VH[token - first_id]
    return y_TH if out is None else out.copy_(y_TH)
