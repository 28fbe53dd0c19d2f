"""Hugging Face safetensors folders: memory mapped, one file or several with an index; only what is asked for is read.

Knows files, tensor names and how they are stored (plain, or FP8 with scales by block); not which rank asks or why.
Errors say which file or tensor is wrong, with the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrows.arch.config import Quantization
from narrows.arch.quantization import check_loadable
from narrows.arch.weights import Weight
from narrows.errors import CheckpointError
from narrows.weights.fp8 import covering_blocks, dequantize_blocks, scale_shape

__all__ = ["SafetensorsFolder"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PLAIN = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALE = "_scale_inv"  # behind the name of the tensor that it scales
_MAPPED = 128 << 20
"""Bytes read through one mapping of a file: then it is mapped anew, so that what was read need not stay in memory."""


class SafetensorsFolder:
    """The tensors of a checkpoint folder. Safe to share between threads: files are only read.

    Args:
        quantization: what ``config.json`` says of how weights are stored.
        dtype: of weights that are dequantised; others keep the checkpoint's.
    """

    def __init__(
        self, folder: Path, *, quantization: Quantization | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        check_loadable(quantization, str(folder))
        self.folder, self.dtype = folder, dtype
        self._block = quantization.weight_block_size if quantization else None
        self._files = {path: _open(path) for path in self._paths()}
        self._where = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._num_read = dict.fromkeys(self._files, 0)

    def _paths(self) -> list[Path]:
        index = self.folder / _INDEX
        if not index.is_file():
            if (self.folder / _SINGLE).is_file():
                return [self.folder / _SINGLE]
            raise CheckpointError(
                f"{self.folder}: holds neither {_SINGLE} nor {_INDEX}; put the weights there, "
                "or use --load-format dummy to run with random ones"
            )
        names = _shard_names(index)
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of the {len(names)} files that {_INDEX} names are missing, "
                f"first {missing[0]}; download the checkpoint again"
            )
        return [self.folder / name for name in names]

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        path = self._where.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing ({len(self._where)} tensors in {len(self._files)} file(s)); "
                "the checkpoint is incomplete, or not the architecture that config.json names"
            )
        view = self._files[path].get_slice(name)
        shape = tuple(view.get_shape())
        if shape != weight.shape:
            raise CheckpointError(f"{path.name}: {name} has shape {shape}, but config.json implies {weight.shape}")
        stored = view.get_dtype()
        if stored == _FP8:
            return self._dequantized(name, weight, span)
        if stored not in _PLAIN:
            raise CheckpointError(
                f"{path.name}: {name} is stored as {stored}; supported: {', '.join(_PLAIN)}, and {_FP8} with scales "
                "by block"
            )
        lo, hi = span or (0, shape[weight.dim or 0])
        taken: Tensor = view[:, lo:hi].contiguous() if weight.dim == 1 else view[lo:hi]
        self._note(path, taken.nbytes)
        return taken

    def _note(self, path: Path, nbytes: int) -> None:
        """Counts what was read of a file. Threads may count too little: then the next one maps it anew."""
        self._num_read[path] += nbytes
        if self._num_read[path] > _MAPPED:
            self._num_read[path] = 0
            self._files[path] = _open(path)

    def _dequantized(self, name: str, weight: Weight, span: tuple[int, int] | None) -> Tensor:
        """The span of an FP8 tensor times its scales; only the blocks that cover it are read."""
        block = self._block
        if block is None or len(weight.shape) != 2:
            raise CheckpointError(
                f"{self._where[name].name}: {name} {weight.shape} is stored as {_FP8}, which takes a matrix and a "
                "quantization_config with weight_block_size in config.json"
            )
        scales = self._scales(name, scale_shape((weight.shape[0], weight.shape[1]), block), block)
        rows, columns = [
            span if span is not None and dim == (weight.dim or 0) else (0, weight.shape[dim]) for dim in (0, 1)
        ]
        self._note(self._where[name], (rows[1] - rows[0]) * (columns[1] - columns[0]))
        (b_lo, b_hi), (c_lo, c_hi) = covering_blocks(rows, block[0]), covering_blocks(columns, block[1])
        return dequantize_blocks(
            self._files[self._where[name]].get_slice(name)[rows[0] : rows[1], columns[0] : columns[1]],
            scales[b_lo:b_hi, c_lo:c_hi],
            block,
            (rows[0] - b_lo * block[0], columns[0] - c_lo * block[1]),
            self.dtype,
        )

    def _scales(self, name: str, shape: tuple[int, int], block: tuple[int, int]) -> Any:
        """The tensor of scales, unread, after its shape and dtype were checked."""
        path = self._where.get(name + _SCALE)
        if path is None:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {_FP8}, but its scales {name + _SCALE} {shape} are missing; "
                "download the checkpoint again"
            )
        view = self._files[path].get_slice(name + _SCALE)
        found = tuple(view.get_shape())
        if found != shape:
            raise CheckpointError(
                f"{path.name}: {name + _SCALE} has shape {found}, but blocks of {block[0]} x {block[1]} make it {shape}"
            )
        if view.get_dtype() not in _PLAIN:
            raise CheckpointError(
                f"{path.name}: {name + _SCALE} is stored as {view.get_dtype()}; supported: {', '.join(_PLAIN)}"
            )
        return view


def _shard_names(index: Path) -> list[str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        raw = None
    where = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: not a safetensors index (no 'weight_map' object from tensors to files)")
    return sorted(set(where.values()))


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes; {str(error).strip()}); download it again"
        ) from None
