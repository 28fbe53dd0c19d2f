"""The sum of two tensors of rows, where no norm follows that would take it along."""

import torch
from torch import Tensor

from narrows.ops.compiled import kernels

__all__ = ["add_rows"]


def add_rows(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    """``a + b`` for [T, H] rows of one dtype, summed in float32 and rounded to it; the same bits as torch's."""
    compiled = kernels()
    if compiled is None or a_TH.dtype not in (torch.bfloat16, torch.float32) or not _alike(a_TH, b_TH):
        return a_TH + b_TH
    out_TH = torch.empty_like(a_TH)
    num_rows, width = a_TH.shape
    wide, num_threads = a_TH.dtype == torch.float32, torch.get_num_threads()
    compiled.add_rows(out_TH.data_ptr(), a_TH.data_ptr(), b_TH.data_ptr(), num_rows, width, wide, num_threads)
    return out_TH


def _alike(a_TH: Tensor, b_TH: Tensor) -> bool:
    same = a_TH.dtype == b_TH.dtype and a_TH.shape == b_TH.shape and a_TH.device.type == b_TH.device.type == "cpu"
    return same and a_TH.dim() == 2 and a_TH.is_contiguous() and b_TH.is_contiguous()
