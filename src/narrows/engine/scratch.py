"""Memory for what recorded walks allocate: one place that all tapes of a rank write, since it runs one step at a time.

Knows bytes, and who still holds them; not what they mean. Within a walk, memory that nobody holds any more is taken
again, so that a layer finds what the layer before it has left in the caches; the next walk begins from the front. It
is a range of addresses of which only what was touched exists.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scratch"]

_ALIGN = 64
_UNUSED = 2
"""References to a piece of memory when no tensor lies in it: the list's own, and the one that counts."""


class Scratch:
    """``nbytes`` of addresses. :meth:`begin` starts a walk; what earlier walks took is theirs again when they run."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._size = nbytes
        self._pieces: dict[int, list[Any]] = {}
        self.used = 0
        """Bytes that the walk has needed."""

    def begin(self) -> None:
        """All memory is free, whoever holds it."""
        self._pieces, self.used = {}, 0

    def take(self, like: Tensor) -> Tensor | None:
        """A tensor of the shape, strides and dtype of ``like`` that lies here (``like`` itself if it has no bytes);
        None if there is no room for it."""
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
