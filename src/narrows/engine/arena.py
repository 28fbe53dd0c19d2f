"""The arena that captured steps allocate from: one per rank, since a rank runs one step at a time.

Within a step, memory whose tensors are gone is given out again, so that a layer finds the previous layer's memory in
the CPU's caches. The arena is a range of addresses; only touched pages exist.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arena"]

_ALIGN = 64
_UNUSED = 2
"""References to a piece of memory without a tensor: the list's own, and the argument of ``getrefcount``."""


class Arena:
    """``nbytes`` of addresses. :meth:`reset` starts a capture; earlier captures use the same addresses again when they
    are replayed."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._size = nbytes
        self._pieces: dict[int, list[Any]] = {}
        self.used = 0
        """Bytes taken since the last :meth:`reset`."""

    def reset(self) -> None:
        """Free all memory, also what tensors still hold."""
        self._pieces, self.used = {}, 0

    def take(self, like: Tensor) -> Tensor | None:
        """A tensor with the shape, strides and dtype of ``like`` in the arena (``like`` itself if it has no bytes);
        None if there is no room."""
        size = -(-like.untyped_storage().nbytes() // _ALIGN) * _ALIGN
        if not size:
            return like
        pieces = self._pieces.setdefault(size, [])
        for i in range(len(pieces)):
            if sys.getrefcount(pieces[i]) == _UNUSED:
                return _laid(pieces[i], like)
        if self.used + size > self._size:
            return None
        pieces.append((ctypes.c_char * size).from_buffer(self._memory, self.used))
        self.used += size
        return _laid(pieces[-1], like)


def _laid(memory: Any, like: Tensor) -> Tensor:
    plain = torch.frombuffer(memory, dtype=torch.uint8, count=like.untyped_storage().nbytes())
    return plain.view(like.dtype).as_strided(like.shape, like.stride())
