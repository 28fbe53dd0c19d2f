"""Reads GGUF files: memory mapped, and dequantised per rank and slice, under Hugging Face's names.

No folder is written, and no other rank's values are decoded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from narrows.arch.weights import Weight
from narrows.convert.gguf_config import gguf_config
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_tensors import Target, gguf_targets
from narrows.convert.gguf_values import target_blocks, target_pieces
from narrows.errors import CheckpointError

__all__ = ["GgufWeights"]


class GgufWeights:
    """The tensors of a GGUF file under Hugging Face's names. Safe to share between threads: the file is only read.

    Args:
        dtype: of the returned tensors; values are computed in float32 and rounded once.

    Raises:
        CheckpointError: the file is cut off or contradicts itself.
        ConfigError: an architecture or an encoding that is not supported; the message lists the supported ones.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.dtype = path, dtype
        header = GgufHeader(path)
        self._targets = gguf_targets(header, gguf_config(header))
        self._file = GgufFile(header)

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        to, spans = self._target(weight, span)
        out = torch.empty([hi - lo for lo, hi in spans], dtype=self.dtype)
        rows = out if out.dim() == 2 else out[None]
        row = 0
        for piece in target_pieces(self._file, to, spans[0], spans[-1], expert or 0):
            rows[row : row + len(piece)] = torch.from_numpy(piece)
            row += len(piece)
        return out

    def take_blocks(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        to, spans = self._target(weight, span)
        return torch.from_numpy(target_blocks(self._file, to, spans[0], spans[-1], expert or 0))

    def _target(self, weight: Weight, span: tuple[int, int] | None) -> tuple[Target, list[tuple[int, int]]]:
        """Where the weight is, and the span along each of its dimensions."""
        to = self._targets.get(weight.name)
        if to is None:
            raise CheckpointError(f"{self.path}: tensor {weight.name} is missing ({len(self._targets)} tensors)")
        if to.shape != weight.shape:
            raise CheckpointError(
                f"{self.path}: {to.source} has shape {to.shape}, but the metadata implies {weight.shape}"
            )
        spans = [(0, size) for size in to.shape]
        if span is not None:
            spans[weight.dim or 0] = span
        return to, spans
