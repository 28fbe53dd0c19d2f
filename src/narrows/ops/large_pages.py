"""Memory for weights in pages of 2 MB, where the system has them to give.

A decode step reads each weight once, from front to back: with pages of 4 KB that is a walk through the page table for
every 4 KB, and the CPU's own prefetching starts again at each (docs/kernels.md has what it costs). Weights lie one
after the other, so that small ones share a page.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

__all__ = ["LargePages"]

_CHUNK = 64 << 20
"""Bytes allocated at a time. What is never written takes no memory."""
_PAGE = 2 << 20
_LINE = 64


class LargePages:
    """Hands out memory that is never given back one piece at a time: it goes with the last tensor of its chunk."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._next = self._stop = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if self._chunk is None or self._next + nbytes > self._stop:
            size = max(_CHUNK, -(-nbytes // _PAGE) * _PAGE)
            self._chunk = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
            start = torch.frombuffer(self._chunk, dtype=torch.uint8).data_ptr()
            self._next = -start % _PAGE
            self._stop = self._next + size
        at, self._next = self._next, self._next + -(-nbytes // _LINE) * _LINE
        return torch.frombuffer(self._chunk, dtype=dtype, count=math.prod(shape), offset=at).view(shape)
