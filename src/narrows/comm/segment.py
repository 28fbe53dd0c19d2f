"""A rank's shared memory, which its peers on this host read and it alone writes.

The memory is an anonymous file, larger than any rank needs, of which only the touched pages exist. It grows without the
help of peers, and goes with its last process, however that ends. Blocks have three uses:

- *lent*: a send buffer, from :meth:`Segment.lend` until it has been handed to a collective and read by all;
- *staged*: a copy of an input that lies elsewhere, until all have read it;
- *large results*: the caller's own until it drops them. A copy to fresh pages is several times slower, and a result
  that goes into the next collective needs no copy.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from narrows.comm.buffers import SendBuffers

__all__ = ["SEGMENT_BYTES", "Block", "Segment", "mapped"]

SEGMENT_BYTES = 1 << 36
_LEAST = 1 << 14
_HUGE = 1 << 21
_ROOMY = 4
"""A block is used for requests down to this fraction of its size."""
_OWN_RESULT = 1 << 18
"""Results of at least so many bytes lie in a block; for smaller ones malloc reuses freed memory."""
_UNUSED = 2
"""References to a block's memory when no tensor lies in it: the block's own, and that of the counting call."""


class Exchanges(Protocol):
    """The exchanges of one group; ``number`` counts the complete ones."""

    number: int


class Block:
    """A piece of a segment, and the exchange after which it may be written again."""

    __slots__ = ("after", "lent", "memory", "reserved", "size", "start", "tensor")

    def __init__(self, memory: Any, size: int) -> None:
        self.memory = memory
        self.size = size
        self.start = ctypes.addressof(memory)
        self.lent = False
        self.reserved = False
        """A captured step writes it each time that it is replayed."""
        self.after: tuple[Exchanges, int] | None = None
        """(group, exchange): it may be written again when that exchange of that group lies behind every member."""
        self.tensor: Tensor | None = None

    def as_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor that lies here. ``shape`` has elements."""
        return torch.frombuffer(self.memory, dtype=dtype, count=math.prod(shape)).view(shape)

    def is_free(self) -> bool:
        """Whether it is not in use, and all have read it."""
        if self.lent or self.reserved:
            return False
        return self.after is None or self.after[0].number > self.after[1]


class Segment(SendBuffers):
    """The shared memory of this rank."""

    def __init__(self, blocks_start: int) -> None:
        self.fd = os.memfd_create("narrows rank", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, SEGMENT_BYTES)
            self.map = mapped(self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.latest: tuple[Exchanges, int] | None = None
        """The last exchange that this rank came to, in any group."""
        self.noted: list[Block] | None = None
        """While a step is captured: every block that it uses."""
        self._next = blocks_start
        self._scratch: dict[int, list[Block]] = {}
        self._results: dict[int, list[Block]] = {}
        self._lent: dict[int, Block] = {}

    def holds(self, address: int) -> bool:
        return 0 <= address - self.start < SEGMENT_BYTES

    # --- send buffers

    def is_lent(self, x: Tensor) -> bool:
        return bool(self._lent) and x.untyped_storage().data_ptr() in self._lent

    def lend(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        size = rows * width * dtype.itemsize
        if not size:
            return torch.empty((rows, width), dtype=dtype)
        block = self.take(size)
        block.lent = True
        self._lent[block.start] = block
        x = block.tensor
        if x is None or x.dtype != dtype or x.shape != (rows, width):
            x = block.tensor = block.as_tensor((rows, width), dtype)
        return x

    def give_back(self, tensors: Sequence[Tensor]) -> None:
        """The lent ones are free again once the latest exchange lies behind every member."""
        if self._lent:
            for x in tensors:
                block = self._lent.pop(x.untyped_storage().data_ptr(), None)
                if block is not None:
                    block.lent, block.after = False, self.latest

    # --- for the transports

    def take(self, nbytes: int) -> Block:
        """A block for something to send; the caller sets its ``after``."""
        return self._find(self._scratch, nbytes, results=False)

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result, which is the caller's own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _OWN_RESULT:
            return torch.empty(shape, dtype=dtype)
        return self._find(self._results, nbytes, results=True).as_tensor(shape, dtype)

    def _find(self, kept: dict[int, list[Block]], nbytes: int, *, results: bool) -> Block:
        least = max(_LEAST, 1 << (nbytes - 1).bit_length())
        size = least
        while size <= _ROOMY * least:
            for block in kept.get(size, ()):
                if block.is_free() and (not results or sys.getrefcount(block.memory) == _UNUSED):
                    return self._noted(block)
            size *= 2
        block = self._make(least)
        kept.setdefault(least, []).append(block)
        return self._noted(block)

    def _noted(self, block: Block) -> Block:
        if self.noted is not None:
            self.noted.append(block)
        return block

    def _make(self, size: int) -> Block:
        align = min(size, _HUGE)
        start = -(-self._next // align) * align
        if start + size > SEGMENT_BYTES:
            raise MemoryError(f"collectives of this rank hold {start:,} bytes, and want {size:,} more")
        self._next = start + size
        return Block((ctypes.c_char * size).from_buffer(self.map, start), size)


def mapped(fd: int) -> mmap.mmap:
    """A segment in this process's memory, for as long as anything refers to it.

    Raises:
        OSError: there is no room for it, e.g. under a limit of virtual memory.
    """
    found = mmap.mmap(fd, SEGMENT_BYTES)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
        if hasattr(mmap, advice):
            found.madvise(getattr(mmap, advice))
    return found
