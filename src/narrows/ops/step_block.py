"""The numbers of one step on their way to the device: gathered on the host, sent by one copy that nobody waits for.

A copy of ordinary memory to a GPU makes the host wait for all work that the GPU was given before. So all that a step
needs lies in one block of pinned memory. torch keeps that memory until the copy is done, and hands it out again then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Layout", "Part", "StepBlock"]

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Types and shapes of a block's arrays: blocks of one layout have them in the same places."""

ALIGNMENT = 16
"""Bytes: each part begins at a multiple, as kernels that load several numbers at once want."""


class Part:
    """An array of a block. ``tensor`` is it on the device, once the block has been sent."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._tensor = tensor

    @property
    def tensor(self) -> Tensor:
        assert self._tensor is not None, "the block has not been sent"
        return self._tensor

    def outlive(self) -> None:
        """Copies it, on the device, so that who keeps it does not keep the whole block."""
        self._tensor = self.tensor.clone()


class StepBlock:
    """One step's arrays. On the CPU nothing is sent: each is a tensor as soon as it is put.

    ``stays``: they are in one block there too, which a later step may be sent into.
    """

    def __init__(self, device: torch.device, *, stays: bool = False) -> None:
        self.device = device
        self.is_remote = stays or device.type != "cpu"
        """Whether parts are elsewhere than the host's numbers, so that no shape should depend on those."""
        self.is_sent = False
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._parts: list[Part] = []

    @property
    def layout(self) -> Layout:
        """Of what has been put so far."""
        return tuple((array.dtype.str, array.shape) for array in self._arrays)

    def put(self, values: Sequence[float] | np.ndarray[Any, Any], dtype: type = np.int64) -> Part:
        """One more array, of numbers of ``dtype``; what it holds may not change before the block is sent."""
        assert not self.is_sent, "the block has been sent"
        array: np.ndarray[Any, Any] = np.ascontiguousarray(values, dtype=dtype)
        if not self.is_remote:
            return Part(torch.from_numpy(array))
        self._arrays.append(array)
        self._parts.append(Part())
        return self._parts[-1]

    def send(self, into: Tensor | None = None) -> Tensor:
        """Starts the copy. Work that the device is given from now on sees the parts.

        ``into``: the memory of an earlier block of the same layout.

        Returns:
            the block's memory on the device.
        """
        self.is_sent = True
        if not self._arrays:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        host = packed(self._arrays)
        if self.device.type != "cpu":
            pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
            pinned.copy_(host)
            host = pinned
        memory = host.to(self.device, non_blocking=True) if into is None else into.copy_(host, non_blocking=True)
        sent = unpacked(memory, self._arrays)
        for part, tensor in zip(self._parts, sent, strict=True):
            part._tensor = tensor
        return memory


def packed(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """The arrays one after the other, as bytes."""
    block = np.zeros(sum(_room(array) for array in arrays), dtype=np.uint8)
    start = 0
    for array in arrays:
        block[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start += _room(array)
    return torch.from_numpy(block)


def unpacked(block: Tensor, arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Views of ``block`` with the types and shapes of ``arrays``, where `packed` has put them."""
    tensors, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(block[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _room(array)
    return tensors


def _room(array: np.ndarray[Any, Any]) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT
