"""The compiled functions of the shared-memory collectives, and the memory layout in which they read a call.

The layout is that of `csrc/runtime/collectives.cpp`. The description of a call is the same from step to step, so it is
laid out once and kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from narrows.native import library

__all__ = [
    "DIFFERS",
    "NOT_YET",
    "STAGED_SMALL",
    "SUMMED",
    "Call",
    "Functions",
    "Limits",
    "column_call",
    "functions",
    "gather_call",
    "numbers",
    "reduce_call",
]

NOT_YET, DIFFERS = 1, 2
"""Results of a call beside 0 (done): NOT_YET, make it again with the same arguments; DIFFERS, members made different
calls."""
STAGED_SMALL = -1
"""Instead of an address: the input is copied to the small memory that every exchange has."""

_KEPT_CALLS = 1 << 12
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

SUMMED = frozenset(_CODES)
"""What can be summed."""

Numbers = ctypes.Array[ctypes.c_int64]


def numbers(*values: int) -> Numbers:
    return (ctypes.c_int64 * len(values))(*values)


class Limits(NamedTuple):
    """Constants of the compiled library: sizes in bytes, and largest numbers."""

    endpoint_bytes: int
    blocks_start: int
    max_groups: int
    max_fields: int
    max_ranks: int
    small_bytes: int
    """Inputs of one rank that an exchange takes without a block."""


class Functions(NamedTuple):
    """The compiled functions, which take the addresses of an endpoint, a call and its arguments."""

    gather: Callable[[int, int, int], int]
    reduce: Callable[[int, int, int], int]
    limits: Limits
    reduce_norm: Callable[[int, int, int], int]


@cache
def functions() -> Functions | None:
    """None where there is no compiled code: ``narrows.native.why_absent`` says why."""
    opened = library()
    if opened is None:
        return None
    for function in (opened.narrows_shm_gather, opened.narrows_shm_reduce, opened.narrows_shm_reduce_norm):
        function.argtypes, function.restype = (ctypes.c_void_p,) * 3, ctypes.c_int
    layout = numbers(*(0,) * len(Limits._fields))
    opened.narrows_shm_layout.restype = None
    opened.narrows_shm_layout(layout)
    return Functions(
        opened.narrows_shm_gather, opened.narrows_shm_reduce, Limits(*layout[:]), opened.narrows_shm_reduce_norm
    )


class Call(NamedTuple):
    """The description of a collective at ``address``, and its sizes for the caller."""

    address: int
    nbytes: tuple[int, ...]
    """Of this rank's input, per field."""
    travels: int
    """The first so many fields are read by other ranks; the rest by this rank only."""
    size: int
    """Rows in all, or columns."""
    held: Numbers


@lru_cache(_KEPT_CALLS)
def gather_call(me: int, counts: tuple[tuple[int, ...], ...], row_bytes: tuple[int, ...]) -> Call:
    """A gather of fields: of field f ``counts[f][i]`` rows of member i, of ``row_bytes[f]`` bytes each."""
    parts = []
    for row, split in zip(row_bytes, counts, strict=True):
        start = 0
        for rows in split:
            parts += [start, row * rows, 1, row * rows]
            start += row * rows
    held = numbers(_signature(0, row_bytes, counts), len(row_bytes), *parts)
    nbytes = tuple(row * split[me] for row, split in zip(row_bytes, counts, strict=True))
    return Call(ctypes.addressof(held), nbytes, len(nbytes), sum(counts[0]), held)


@lru_cache(_KEPT_CALLS)
def column_call(me: int, widths: tuple[int, ...], rows: int, itemsize: int) -> Call:
    """A gather of ``widths`` columns per member, of ``rows`` rows on each."""
    pitch, start, parts = sum(widths) * itemsize, 0, []
    for width in widths:
        parts += [start, width * itemsize, rows, pitch]
        start += width * itemsize
    held = numbers(_signature(1, widths, (rows, itemsize)), 1, *parts)
    return Call(ctypes.addressof(held), (rows * widths[me] * itemsize,), 1, sum(widths), held)


@lru_cache(_KEPT_CALLS)
def reduce_call(
    me: int,
    counts: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    addends: tuple[torch.dtype, ...],
    whole: bool,
    gathers: bool,
    max_fields: int,
) -> Call:
    """The sum of ``[sum(counts), width]`` of every member, and of each one's addends of its own rows.

    ``whole``: each member makes all of it, so that the addends travel too. ``gathers``: what each makes is gathered
    after, which those that come for their own rows alone would not join.
    """
    codes = [_CODES[addend] for addend in addends]
    starts = [0]
    for rows in counts:
        starts.append(starts[-1] + rows * width)
    signature = _signature(2, counts, (width, _CODES[dtype], whole, gathers, *codes))
    held = numbers(signature, _CODES[dtype], whole, len(codes), *codes, *(0,) * (max_fields - len(codes)), *starts)
    own = starts[me + 1] - starts[me]
    nbytes = (starts[-1] * dtype.itemsize, *(own * addend.itemsize for addend in addends))
    return Call(ctypes.addressof(held), nbytes, len(nbytes) if whole else 1, sum(counts), held)


def _signature(kind: int, counts: tuple[int, ...], more: tuple[Any, ...]) -> int:
    """The same on every member that comes to the same call; Python does not salt the hashes of numbers."""
    return hash((kind, counts, more))
