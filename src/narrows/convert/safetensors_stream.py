"""Writes one ``.safetensors`` file a piece of a tensor at a time.

The format: eight bytes with the header's length (little-endian), a JSON header with each tensor's dtype, shape and
position, then the tensors' bytes without gaps. The safetensors library wants all tensors in memory before it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from narrows.errors import ConfigError

__all__ = ["TensorEntry", "check_dtype", "round_to_bfloat16", "write_safetensors"]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor to write: its name and shape, and its float32 values in row-major order, piece by piece."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def check_dtype(dtype: str) -> None:
    """Raise `ConfigError` unless `write_safetensors` can write ``dtype``."""
    if dtype not in _DTYPES:
        raise ConfigError(f"cannot write weights as {dtype!r}; supported: {', '.join(_DTYPES)}")


def write_safetensors(path: Path, entries: Sequence[TensorEntry], *, dtype: str) -> None:
    """Write ``entries`` to ``path``, every value rounded to ``dtype`` (bfloat16, float16 or float32).

    Holds one piece in memory. Raises `ConfigError` for a dtype it does not know, and for a finite value that
    ``dtype`` cannot hold.
    """
    check_dtype(dtype)
    code, cast = _DTYPES[dtype]
    with path.open("wb") as file:
        file.write(_header(entries, code, cast(np.empty(0, np.float32)).itemsize))
        for entry in entries:
            num_written = 0
            for piece in entry.pieces():
                num_written += piece.size
                file.write(_checked(cast, piece, entry.name, dtype).tobytes())
            assert num_written == prod(entry.shape), f"{entry.name}: {num_written} values for shape {entry.shape}"


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 of float32 ``values`` (ties to even, NaN stays NaN), as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")


_DTYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "bfloat16": ("BF16", round_to_bfloat16),
    "float16": ("F16", lambda values: values.astype("<f2")),
    "float32": ("F32", lambda values: values.astype("<f4")),
}


def _checked(cast: Callable[[np.ndarray], np.ndarray], piece: np.ndarray, name: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = cast(piece)
    if dtype == "float16" and np.isinf(result).any() and np.isfinite(piece).all():
        raise ConfigError(
            f"{name} has values up to {np.abs(piece).max():.4g}, beyond float16's 65504; convert to bfloat16 or float32"
        )
    return result


def _header(entries: Iterable[TensorEntry], code: str, itemsize: int) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        stop = start + prod(entry.shape) * itemsize
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text
