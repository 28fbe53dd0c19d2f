"""Hugging Face safetensors folders: memory mapped, one file or several with an index; only requested slices are read.

Plain values, or FP8 with scales by block, which are multiplied in. `tensor_files.py` says which file, `tensor_names.py`
under which name. Errors say which file or tensor is wrong, with the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.arch.config import CheckpointQuantization
from narrows.arch.quantization import check_loadable
from narrows.arch.weights import Weight
from narrows.errors import CheckpointError
from narrows.layout import Span
from narrows.weights.fp8 import covering_blocks, dequantize_blocks, scale_shape
from narrows.weights.tensor_files import open_file, tensor_files
from narrows.weights.tensor_names import Stored, TensorNames, is_vocabulary

__all__ = ["SafetensorsFolder"]

_PLAIN = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALE = "_scale_inv"  # behind the name of the tensor that it scales
_MAPPED = 128 << 20
"""Bytes read through one mapping of a file: then it is mapped again, so that the bytes read need not stay in memory."""


@dataclass(frozen=True, slots=True)
class _Scales:
    """An unread tensor of scales. The blocks of a matrix in it begin at ``first_block``, the matrix ``first_row`` rows
    into these: blocks of a stack run over gate and up as one matrix, or over each of the two."""

    view: Any
    first_block: int = 0
    first_row: int = 0


class SafetensorsFolder:
    """The tensors of a checkpoint folder. Safe to share between threads: files are only read.

    Args:
        quantization: how weights are stored, from ``config.json``.
        dtype: of weights that are dequantised; others keep the checkpoint's.

    Raises:
        CheckpointError: files are missing or broken.
        ConfigError: an unsupported quantisation.
    """

    def __init__(
        self, folder: Path, *, quantization: CheckpointQuantization | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        check_loadable(quantization, str(folder))
        self.folder, self.dtype = folder, dtype
        self._block = quantization.weight_block_size if quantization else None
        found = tensor_files(folder)
        self._files, self._where, self._absent = found.files, found.where, found.absent
        self.names = TensorNames(self._where.keys(), str(folder))
        self.notes = found.notes
        """Notes about the folder."""
        self._num_read = dict.fromkeys(self._files, 0)

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor."""
        return tuple(self._view(name).get_shape())

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        stored = self.names.find(weight, expert)
        if stored is None:
            raise CheckpointError(self.missing(weight, expert))
        view = self._view(stored.name)
        self._check_shape(stored, tuple(view.get_shape()), padded=is_vocabulary(weight))
        rows, columns = (
            span if span is not None and dim == (weight.dim or 0) else (0, size)
            for dim, size in enumerate((*weight.shape, 1)[:2])
        )
        dtype = view.get_dtype()
        if dtype not in (*_PLAIN, _FP8):
            raise CheckpointError(
                f"{self._file(stored)}: {stored.name} is stored as {dtype}; supported: {', '.join(_PLAIN)}, and {_FP8} "
                "with scales by block"
            )
        values = _cut(view, stored, (rows[0] + stored.first_row, rows[1] + stored.first_row), columns)
        self._note(self._where[stored.name], values.nbytes)
        return values.contiguous() if dtype != _FP8 else self._dequantized(values, weight, stored, rows, columns)

    def missing(self, weight: Weight, expert: int | None = None) -> str:
        """The error of a missing weight."""
        full_name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        name = self.names.local(full_name)
        if name in self._absent:
            file = self._absent[name].name
            return f"{self.folder}: the index puts {name} into {file}, which lacks it; download that file again"
        problem = (
            f"{self.folder}: tensor {name} is missing ({len(self._where)} tensors in {len(self._files)} file(s)); "
        )
        if full_name == "lm_head.weight" and not self._absent:
            return problem + 'a head that shares the embedding takes "tie_word_embeddings": true in config.json'
        return f"{problem}the checkpoint is incomplete, or not the architecture that config.json names"

    def _view(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def _file(self, stored: Stored) -> str:
        return self._where[stored.name].name

    def _check_shape(self, stored: Stored, shape: tuple[int, ...], *, padded: bool) -> None:
        want = stored.shape
        if shape == want or (padded and len(shape) == len(want) and shape[0] > want[0] and shape[1:] == want[1:]):
            return
        hint = "; vocab_size there is larger than the checkpoint's" if padded and shape[:1] < want[:1] else ""
        raise CheckpointError(
            f"{self._file(stored)}: {stored.name} has shape {shape}, but config.json implies {want}{hint}"
        )

    def _note(self, path: Path, nbytes: int) -> None:
        """Counts the bytes read of a file. Threads may count too little: then the next one maps it again."""
        self._num_read[path] += nbytes
        if self._num_read[path] > _MAPPED:
            self._num_read[path] = 0
            self._files[path] = open_file(path)

    def _dequantized(self, values: Tensor, weight: Weight, stored: Stored, rows: Span, columns: Span) -> Tensor:
        """FP8 values times their scales; only the scales of the blocks that cover them are read."""
        block = self._block
        if block is None or len(weight.shape) != 2:
            raise CheckpointError(
                f"{self._file(stored)}: {stored.name} {weight.shape} is stored as {_FP8}, which takes a matrix and a "
                "quantization_config with weight_block_size in config.json"
            )
        scales = self._scales(stored, (weight.shape[0], weight.shape[1]), block)
        lo, hi = rows[0] + scales.first_row, rows[1] + scales.first_row
        (b_lo, b_hi), (c_lo, c_hi) = covering_blocks((lo, hi), block[0]), covering_blocks(columns, block[1])
        return dequantize_blocks(
            values,
            _cut(scales.view, stored, (b_lo + scales.first_block, b_hi + scales.first_block), (c_lo, c_hi)),
            block,
            (lo - b_lo * block[0], columns[0] - c_lo * block[1]),
            self.dtype,
        )

    def _scales(self, stored: Stored, shape: tuple[int, int], block: tuple[int, int]) -> _Scales:
        """The scales of a matrix of ``shape``, after their shape and dtype were checked."""
        stack, matrix = stored.shape[:-2], (stored.shape[-2], stored.shape[-1])
        name = stored.name + _SCALE
        own, fused = scale_shape(shape, block), scale_shape(matrix, block)
        if name not in self._where:
            raise CheckpointError(
                f"{self.folder}: {stored.name} is stored as {_FP8}, but its scales {name} {(*stack, *fused)} are "
                "missing; download the checkpoint again"
            )
        view, file = self._view(name), self._where[name].name
        if view.get_dtype() not in _PLAIN:
            raise CheckpointError(f"{file}: {name} is stored as {view.get_dtype()}; supported: {', '.join(_PLAIN)}")
        found, each = tuple(view.get_shape()), (own[0] * (matrix[0] // shape[0]), own[1])
        if fused == each and matrix != shape and shape[0] % block[0]:
            raise CheckpointError(
                f"{file}: {name} {found} may be of blocks of {block[0]} rows over {matrix[0]} rows, or over {shape[0]} "
                "twice; save the experts one by one (transformers' save_pretrained does)"
            )
        if found == (*stack, *fused):
            return _Scales(view, first_row=stored.first_row)
        if found == (*stack, *each):
            return _Scales(view, first_block=own[0] if stored.first_row else 0)
        raise CheckpointError(
            f"{file}: {name} has shape {found}, but blocks of {block[0]} x {block[1]} make it {(*stack, *fused)}"
        )


def _cut(view: Any, stored: Stored, rows: Span, columns: Span) -> Tensor:
    """Values of an unread tensor, at the index of the stack that ``stored`` says."""
    index: tuple[Any, ...] = (slice(*rows), slice(*columns))[: len(stored.shape) - (stored.expert is not None)]
    cut: Tensor = view[index if stored.expert is None else (stored.expert, *index)]
    return cut
