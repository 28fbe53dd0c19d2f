"""GGUF files as they are: memory mapped, and dequantised where a rank asks. Knows Hugging Face's names for what is in
the file; not which rank asks or why. No folder is written, and no other rank's values are decoded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from narrows.arch.weights import Weight
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_tensors import gguf_targets, row_order
from narrows.errors import CheckpointError

__all__ = ["GgufWeights"]

_ONE_ROW = np.zeros(1, np.int64)


class GgufWeights:
    """The tensors of a GGUF file under Hugging Face's names. Safe to share between threads: the file is only read.

    Args:
        dtype: that of what is handed out; values are computed in float32 and rounded once.

    Raises:
        CheckpointError: the file is cut off or contradicts itself.
        ConfigError: an architecture or an encoding that is not supported; the message names what is.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.dtype = path, dtype
        header = GgufHeader(path)
        self._tensors = {to.name: (name, to) for name, to in gguf_targets(header).items()}
        self._file = GgufFile(header)

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        if weight.name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {weight.name} is missing ({len(self._tensors)} tensors)")
        name, to = self._tensors[weight.name]
        if to.shape != weight.shape:
            raise CheckpointError(f"{self.path}: {name} has shape {to.shape}, but the metadata implies {weight.shape}")
        lo, hi = span or (0, weight.shape[weight.dim or 0])
        order = row_order(to)
        if len(to.shape) == 1:  # one row of the file: small, and the only place where reordered values share blocks
            whole = self._fill((1, to.shape[0]), name, _ONE_ROW, (0, to.shape[0]))[0]
            return whole[torch.from_numpy(order[lo:hi])]
        if weight.dim == 1:
            return self._fill((len(order), hi - lo), name, order, (lo, hi))
        return self._fill((hi - lo, to.shape[1]), name, order[lo:hi], (0, to.shape[1]))

    def _fill(self, shape: tuple[int, int], name: str, rows: np.ndarray, columns: tuple[int, int]) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        row = 0
        for piece in self._file.pieces(name, rows, columns):
            out[row : row + len(piece)] = torch.from_numpy(piece)
            row += len(piece)
        return out
