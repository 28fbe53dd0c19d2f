"""Pickles calls and results: tensors as plain bytes, and objects of some types only once.

Torch's own reduction goes through a file format (200 us for one tensor) or, with multiprocessing, through shared
memory, which other hosts lack and a killed process leaves behind.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

__all__ = ["Packer", "Unpacker", "pack"]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, packer: Packer | None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._packer = packer

    # Not persistent_id, which pickle calls for every number too.
    def reducer_override(self, thing: Any) -> Any:
        if self._packer is not None and (number := self._packer.number_of(thing)) is not None:
            return _kept, (number,)
        if type(thing) is Tensor and thing.device.type == "cpu" and thing.layout is torch.strided:
            flat = thing.detach().contiguous().view(-1).view(torch.uint8)
            return _tensor, (flat.numpy().tobytes(), thing.dtype, tuple(thing.shape))
        return NotImplemented


def _kept(number: int) -> Any:
    """A placeholder, which :class:`Unpacker` replaces by the object that it has kept."""
    raise AssertionError("only an Unpacker has the object")


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def pack(thing: Any, packer: Packer | None = None) -> bytes:
    """``thing`` as bytes. Objects that ``packer`` sends only once are replaced by their numbers."""
    file = io.BytesIO()
    _Pickler(file, packer).dump(thing)
    return file.getvalue()


class Packer:
    """Numbers the objects of the types ``once`` by identity. It keeps them, so that no other object gets their address.

    After :func:`pack`, :meth:`take_new` returns those that the other side does not have yet.
    """

    def __init__(self, once: tuple[type, ...]) -> None:
        self._once = once
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._new: list[tuple[int, Any]] = []

    def number_of(self, thing: Any) -> int | None:
        if not isinstance(thing, self._once):
            return None
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = (len(self._numbers), thing)
            self._new.append(self._numbers[id(thing)])
        return self._numbers[id(thing)][0]

    def take_new(self) -> list[bytes]:
        """The objects numbered since the last call, each packed for :meth:`Unpacker.keep`."""
        new, self._new = self._new, []
        return [pack(entry) for entry in new]


class Unpacker:
    """The other side: returns the same object for the same number."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def keep(self, data: bytes) -> None:
        """Keeps an object that :meth:`Packer.take_new` has packed."""
        number, thing = pickle.loads(data)
        self._kept[number] = thing

    def __call__(self, data: bytes) -> Any:
        return _Unpickler(io.BytesIO(data), self._kept).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: dict[int, Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def find_class(self, module: str, name: str) -> Any:
        if name == _kept.__name__ and module == __name__:
            return self._kept.__getitem__
        return super().find_class(module, name)
