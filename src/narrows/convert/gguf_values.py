"""The values of Hugging Face's tensors, read from a GGUF file: rows put back in order, experts and heads cut out.

Rows are reordered while still quantised, as a block never spans rows. Only what a caller asks for is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_tensors import Latent, Target

__all__ = ["target_blocks", "target_pieces"]

Span = tuple[int, int]
_ONE_ROW = np.zeros(1, np.int64)


def target_pieces(file: GgufFile, to: Target, rows: Span, columns: Span, expert: int = 0) -> Iterator[np.ndarray]:
    """Float32 values of tensor ``to``, ``rows`` and of them ``columns``, some rows at a time: [some rows, columns].

    A vector is one row, and ``rows`` picks of its values. ``expert``: of a tensor that there is one of per expert.
    """
    lo, hi = rows
    if lo >= hi or columns[0] >= columns[1]:
        return
    if to.source is None:
        yield np.zeros((1, hi - lo) if len(to.shape) == 1 else (hi - lo, columns[1] - columns[0]), np.float32)
    elif isinstance(to.source, Latent):
        yield from _latent_pieces(file, to.source, to.shape[1], rows, columns)
    elif len(to.shape) == 1:  # small, and the only place where reordered values share blocks
        whole = np.concatenate([piece[0] for piece in file.pieces(to.source, _ONE_ROW, (0, to.shape[0]))])
        yield whole[_row_order(to)[lo:hi]][None]
    else:
        first = to.first_row + expert * to.stride
        yield from file.pieces(to.source, first + _row_order(to)[lo:hi], columns)


def target_blocks(file: GgufFile, to: Target, rows: Span, columns: Span, expert: int = 0) -> np.ndarray:
    """The stored bytes of a matrix of one source tensor, ``rows`` and of them ``columns``: [rows, bytes]."""
    assert isinstance(to.source, str), f"{to.name} is made of several tensors"
    first = to.first_row + expert * to.stride
    return file.blocks(to.source, first + _row_order(to)[rows[0] : rows[1]], columns)


def _row_order(to: Target) -> np.ndarray:
    """For each row of Hugging Face's tensor, its row in the file."""
    rows = np.arange(to.shape[0])
    if to.heads is None:
        return rows
    half = to.shape[0] // to.heads // 2
    return rows.reshape(to.heads, half, 2).swapaxes(1, 2).reshape(-1)


def _latent_pieces(file: GgufFile, latent: Latent, rank: int, rows: Span, columns: Span) -> Iterator[np.ndarray]:
    """``kv_b_proj``: by head, its keys' rows (columns of the file's tensor), then its values' rows."""
    per_head = latent.nope + latent.v
    for head in range(rows[0] // per_head, -(-rows[1] // per_head)):
        lo, hi = (min(max(row - head * per_head, 0), per_head) for row in rows)
        keys = (lo, min(hi, latent.nope))
        if keys[0] < keys[1]:
            file_rows = head * rank + np.arange(*columns)
            yield np.ascontiguousarray(np.concatenate(list(file.pieces(latent.keys, file_rows, keys))).T)
        values = np.arange(max(lo - latent.nope, 0), max(hi - latent.nope, 0))
        if len(values):
            yield from file.pieces(latent.values, head * latent.v + values, columns)
