"""Reusable send buffers of a communicator.

Knows tensors only; moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Buffers"]

_CPU = torch.device("cpu")


class Buffers:
    """Memory by (width, dtype), lent until it is given back."""

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._lent: dict[int, tuple[tuple[int, torch.dtype], Tensor]] = {}  # by address of the storage

    def lend(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        key, size = (width, dtype), rows * width
        free = self._free.setdefault(key, [])
        flat = free.pop() if free else None
        if flat is None or flat.numel() < size:
            flat = torch.empty(max(size, 1), dtype=dtype, device=self._device)
        self._lent[flat.untyped_storage().data_ptr()] = (key, flat)
        return flat[:size].view(rows, width)

    def give_back(self, tensors: Sequence[Tensor]) -> None:
        if self._lent:
            for x in tensors:
                lent = self._lent.pop(x.untyped_storage().data_ptr(), None)
                if lent is not None:
                    self._free[lent[0]].append(lent[1])

    def owned(self, x: Tensor) -> Tensor:
        """``x`` as a result: itself, or a copy if it lies in a send buffer, which is then free again."""
        if x.untyped_storage().data_ptr() not in self._lent:
            return x
        out = x.clone()
        self.give_back((x,))
        return out
