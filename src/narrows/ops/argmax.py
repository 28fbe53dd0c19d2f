"""Greedy choice over a vocabulary of which each rank holds some columns: each proposes, then one picks.

The proposals of all ranks are one tensor, so that they can travel as one.

Letters: T rows, V columns held here, W proposals per row.
"""

import torch
from torch import Tensor

from narrows.ops.compiled import kernels

__all__ = ["argmax", "pick", "pick_reference", "shard_argmax"]

NO_ID = float(2**53)
"""The id proposed by a shard without columns: larger than every real one, so that it also loses among equal values."""


def shard_argmax(logits_TV: Tensor, first_id: int, *, out: Tensor | None = None) -> Tensor:
    """``(max_v logits[t, v], first_id + argmax_v logits[t, v])`` per row, as one tensor.

    Shapes: logits [T, V] of any float dtype -> [T, 2] float64: value, id. float64 holds every float32 and every id
    below 2**53 exactly. The lowest id wins among equal values; a NaN counts as the largest value, as in
    ``torch.argmax``. V may be 0: the proposal ``(-inf, 2**53)`` loses against every other.
    """
    num_rows, num_columns = logits_TV.shape
    if out is None:
        out = torch.empty((num_rows, 2), dtype=torch.float64, device=logits_TV.device)
    if num_columns == 0:
        out[:, 0].fill_(float("-inf"))
        out[:, 1].fill_(NO_ID)
        return out
    compiled = kernels()
    if (
        compiled is not None
        and logits_TV.is_cpu
        and logits_TV.dtype in (torch.bfloat16, torch.float32)
        and logits_TV.stride(1) == 1
        and out.is_contiguous()
    ):
        compiled.argmax(
            out.data_ptr(),
            logits_TV.data_ptr(),
            logits_TV.stride(0),
            num_rows,
            num_columns,
            first_id,
            logits_TV.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out
    best_T, column_T = logits_TV.max(dim=-1)
    out[:, 0] = best_T
    out[:, 1] = column_T
    out[:, 1] += first_id
    return out


def argmax(logits_TV: Tensor) -> Tensor:
    """The id of the largest logit of each whole row, ties to the lower id: `pick` of one shard. [T, V] -> [T] int64."""
    if logits_TV.is_cpu:
        return pick(shard_argmax(logits_TV, 0))
    return logits_TV.argmax(dim=-1)


def pick(candidates_T2W: Tensor) -> Tensor:
    """The id of the largest value among a row's proposals, ties to the lower id.

    Shapes: candidates [T, 2W] float64, W pairs (value, id) as `shard_argmax` leaves them, in any order -> ids [T]
    int64. Over shards that together hold all columns this is ``torch.argmax`` of the whole row.
    """
    compiled = kernels()
    if compiled is not None and candidates_T2W.is_cpu and candidates_T2W.dim() == 2 and candidates_T2W.stride(1) == 1:
        num_rows, width = candidates_T2W.shape
        assert width and candidates_T2W.dtype == torch.float64
        ids_T = torch.empty(num_rows, dtype=torch.int64)
        compiled.pick(ids_T.data_ptr(), candidates_T2W.data_ptr(), candidates_T2W.stride(0), num_rows, width // 2)
        return ids_T
    pairs_TW2 = torch.unflatten(candidates_T2W, -1, (-1, 2))
    values_TW, ids_TW = pairs_TW2.unbind(-1)
    best_T1 = values_TW.amax(dim=-1, keepdim=True)
    # amax passes NaN on, and NaN equals nothing: the NaNs themselves are then the best.
    is_best_TW = (values_TW == best_T1) | values_TW.isnan()
    return ids_TW.masked_fill(~is_best_TW, float("inf")).amin(dim=-1).to(torch.int64)


def pick_reference(candidates_T2W: Tensor) -> Tensor:
    """Twin of `pick`, row by row: the smallest (not NaN, -value, id)."""
    ids: list[int] = []
    for row in candidates_T2W.tolist():
        pairs = zip(row[::2], row[1::2], strict=True)
        ids.append(int(min((value == value, -value if value == value else 0.0, token) for value, token in pairs)[2]))
    return torch.tensor(ids, dtype=torch.int64, device=candidates_T2W.device)
