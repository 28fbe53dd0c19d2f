"""The values of a GGUF model's tensors, mapped into memory and dequantised a piece at a time.

Only the rows, and of a row only the blocks, that a caller asks for are read; the arithmetic is the gguf package's.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_part import TensorInfo
from narrows.errors import ConfigError

__all__ = ["GgufFile"]

PIECE = 1 << 18  # values dequantised at once: 1 MiB in float32, which stays in a core's cache


class GgufFile:
    """The tensors of the files that ``header`` describes. Only read, so threads may share it."""

    def __init__(self, header: GgufHeader) -> None:
        """Map the files.

        Raises:
            CheckpointError: one is cut off.
            ConfigError: an encoding that the gguf package cannot decode.
        """
        self.header = header
        self._kinds = {name: _kind(header, info) for name, info in header.tensors.items()}
        mapped = [np.memmap(part.path, np.uint8, "r") for part in header.parts]
        self._rows = {name: self._raw_rows(mapped[info.part], info) for name, info in header.tensors.items()}

    def _raw_rows(self, mapped: np.ndarray, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes as [rows, bytes of a row]; a vector is one row, of several matrices the rows follow."""
        part = self.header.parts[info.part]
        block, block_bytes = GGML_QUANT_SIZES[self._kinds[info.name]]
        num_columns = info.shape[-1] if info.shape else 1
        num_rows = prod(info.shape[:-1])
        if num_columns % block:
            raise part.incomplete(f"{info.name} has rows of {num_columns} values in blocks of {block}")
        row_bytes = num_columns // block * block_bytes
        stop = info.offset + num_rows * row_bytes
        if stop > part.size:
            raise part.incomplete(f"{info.name} ends at byte {stop}")
        return mapped[info.offset : stop].reshape(num_rows, row_bytes)

    def pieces(self, name: str, rows: np.ndarray, columns: tuple[int, int]) -> Iterator[np.ndarray]:
        """Float32 values [some rows, columns] of tensor ``name``: the rows with these numbers, in their order.

        Reads the blocks that cover ``columns`` of these rows, and nothing else. A vector is one row.
        """
        kind, raw = self._kinds[name], self._rows[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        lo, hi = columns
        first, stop = lo // block, -(-hi // block)
        if lo >= hi:
            return
        step = max(1, PIECE // ((stop - first) * block))
        for start in range(0, len(rows), step):
            part = raw[rows[start : start + step], first * block_bytes : stop * block_bytes]
            # As one long row: the package decodes 16 rows at a time, however short they are.
            values = quants.dequantize(np.ascontiguousarray(part).reshape(1, -1), kind).reshape(len(part), -1)
            yield values[:, lo - first * block : hi - first * block]

    def blocks(self, name: str, rows: np.ndarray, columns: tuple[int, int]) -> np.ndarray:
        """The bytes of the rows of tensor ``name`` with these numbers, of the blocks that ``columns`` are, as they
        are: [rows, bytes]."""
        block, block_bytes = GGML_QUANT_SIZES[self._kinds[name]]
        assert columns[0] % block == columns[1] % block == 0, f"columns {columns} of blocks of {block}"
        return self._rows[name][rows, columns[0] // block * block_bytes : columns[1] // block * block_bytes]


def _kind(header: GgufHeader, info: TensorInfo) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(info.encoding)
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        names = [known.name for known in GGMLQuantizationType if known.value == info.encoding]
        encoding = names[0] if names else f"encoding number {info.encoding}"
        raise ConfigError(
            f"{header.path}: {info.name} is encoded as {encoding}, which gguf cannot decode; tested: F32, F16, BF16, "
            "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K"
        ) from None
    return kind
