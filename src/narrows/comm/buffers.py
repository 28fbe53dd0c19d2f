"""Send buffers: memory that a communicator lends, and reuses after the collective that consumed it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Buffers", "SendBuffers"]

_CPU = torch.device("cpu")


class SendBuffers(ABC):
    """Memory that is lent until it is given back."""

    @abstractmethod
    def lend(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``[rows, width]``."""

    @abstractmethod
    def give_back(self, tensors: Sequence[Tensor]) -> None:
        """The lent ones among ``tensors`` may be lent again."""

    @abstractmethod
    def is_lent(self, x: Tensor) -> bool:
        """Whether ``x`` lies in a send buffer."""

    def owned(self, x: Tensor) -> Tensor:
        """``x`` as a result: itself, or a copy if it lies in a send buffer, which is then given back."""
        if not self.is_lent(x):
            return x
        out = x.clone()
        self.give_back((x,))
        return out


class Buffers(SendBuffers):
    """Ordinary memory of a device, by (width, dtype)."""

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

    def is_lent(self, x: Tensor) -> bool:
        return bool(self._lent) and x.untyped_storage().data_ptr() in self._lent
