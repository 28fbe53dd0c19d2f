"""Fingerprint of a collective call (op, label, shapes, counts), and the error message when ranks' fingerprints differ.

PyTorch's ``ProcessGroupWrapper`` has the same idea. In checked mode the ``of_*`` functions add shapes to a fingerprint,
and refuse a tensor that does not fit the counts that it came with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.errors import CollectiveMismatchError

__all__ = [
    "Fingerprint",
    "absence",
    "decoded",
    "encoded",
    "mismatch",
    "of_barrier",
    "of_columns",
    "of_rows",
    "of_sum",
    "of_tensor",
    "rank_names",
]


class Fingerprint(NamedTuple):
    """One rank's description of a collective.

    >>> print(Fingerprint(17, "all_reduce", "layer 3 post_attn_norm", 2, (((5, 64), torch.float32),), (3, 2)))
    #17 all_reduce "layer 3 post_attn_norm" [5 x 64 float32] split 3+2
    >>> print(Fingerprint(4, "barrier", "step 1", 2))
    #4 barrier "step 1"
    """

    number: int
    """How many collectives this rank has come to before in this group."""
    op: str
    label: str
    num_ranks: int
    """Size of the group."""
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shape and dtype per field of what the members make together; empty when not in checked mode."""
    split: tuple[int, ...] = ()
    """Rows, or columns, per member."""
    root: int | None = None
    call: int = 0
    """The engine's call that it belongs to, counted by the rank: a rank that lost a whole call is seen at once."""

    def __str__(self) -> str:
        text = f'#{self.number} {self.op} "{self.label}"'
        if self.shapes:
            fields = [f"{' x '.join(map(str, dims))} {str(dt).removeprefix('torch.')}" for dims, dt in self.shapes]
            text += f" [{', '.join(fields)}]"
        if self.split:
            text += f" split {'+'.join(map(str, self.split))}"
        if self.root is not None:
            text += f" from rank {self.root}"
        if self.call:
            text += f" in call {self.call}"
        return text


# --- messages


def rank_names(ranks: Sequence[int]) -> str:
    """``rank 2``, or ``ranks 0, 1, 3``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def mismatch(ranks: Sequence[int], fingerprints: Sequence[Fingerprint]) -> str:
    """Which ranks came to which collective, the fewest first; empty when all fingerprints are equal.

    >>> a, b = Fingerprint(0, "barrier", "step 1", 3), Fingerprint(0, "barrier", "step 2", 3)
    >>> mismatch((0, 1, 2), (a, b, a))
    'rank 1 came to #0 barrier "step 2", ranks 0, 2 to #0 barrier "step 1"'
    """
    if len(set(fingerprints)) == 1:
        return ""
    if len({fingerprint.call for fingerprint in fingerprints}) == 1:
        fingerprints = [fingerprint._replace(call=0) for fingerprint in fingerprints]  # equal calls explain nothing
    came: dict[Fingerprint, list[int]] = {}
    for rank, fingerprint in zip(ranks, fingerprints, strict=True):
        came.setdefault(fingerprint, []).append(rank)
    fewest_first = sorted(came.items(), key=lambda item: (len(item[1]), item[1]))
    return ", ".join(
        f"{rank_names(members)} {'to' if i else 'came to'} {fingerprint}"
        for i, (fingerprint, members) in enumerate(fewest_first)
    )


def absence(
    waiting: Sequence[tuple[int, Fingerprint]], missing: Mapping[int, tuple[Fingerprint, tuple[int, ...]] | None]
) -> str:
    """At which collectives ranks wait, and to which one, of which group, the missing ranks came last.

    >>> start, step = Fingerprint(0, "barrier", "start", 2), Fingerprint(1, "barrier", "step 1", 2)
    >>> absence([(0, step)], {1: (start, (0, 1))})
    'rank 0 waits at #1 barrier "step 1"; rank 1 last came to #0 barrier "start" of ranks 0, 1'
    """
    parts = [f"rank {rank} waits at {fingerprint}" for rank, fingerprint in waiting]
    for rank, last in missing.items():
        came = f"last came to {last[0]} of {rank_names(last[1])}" if last else "never came"
        parts.append(f"rank {rank} {came}")
    return "; ".join(parts)


# --- on the way to another rank


def encoded(fingerprint: Fingerprint) -> bytes:
    number, op, label, num_ranks, shapes, split, root, call = fingerprint
    fields = [[dims, str(dtype).removeprefix("torch.")] for dims, dtype in shapes]
    return json.dumps([number, op, label, num_ranks, fields, split, root, call]).encode()


def decoded(data: bytes) -> Fingerprint:
    """A fingerprint from a peer: plain values, nothing that could run."""
    number, op, label, num_ranks, shapes, split, root, call = json.loads(data)
    fields = tuple((tuple(dims), getattr(torch, name)) for dims, name in shapes)
    return Fingerprint(number, op, label, num_ranks, fields, tuple(split), root, call)


# --- with shapes


def of_rows(call: Fingerprint, rank: int, me: int, xs: Sequence[Tensor], counts: Sequence[int]) -> Fingerprint:
    """For a gather: each of ``xs`` is ``[counts[me], W_f]``.

    Raises:
        CollectiveMismatchError: a tensor does not fit the counts, or the counts do not fit the group. So for all of
            the ``of_*`` functions.
    """
    _check_counts(call, rank, counts)
    for x in xs:
        _check(call, rank, x, 0, counts[me], counts)
    return call._replace(shapes=tuple(((sum(counts), x.shape[1]), x.dtype) for x in xs), split=tuple(counts))


def of_sum(
    call: Fingerprint, rank: int, me: int, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], *_: object
) -> Fingerprint:
    """For a reduction: ``x`` is ``[sum(counts), W]``, each addend ``[counts[me], W]``, all of at most 32 bits.

    The members' addends of one kind are a field like ``x``: every rank joins as many, of the same dtypes.
    """
    _check_counts(call, rank, counts)
    _check(call, rank, x, 0, sum(counts), counts)
    piece = (counts[me], x.shape[1])
    for addend in addends:
        if tuple(addend.shape) != piece:
            raise _misfit(call, rank, f"an addend of {tuple(addend.shape)} for a piece of {piece}")
    dtypes = (x.dtype, *(addend.dtype for addend in addends))
    for dtype in dtypes:
        if not dtype.is_floating_point or dtype.itemsize > 4:
            raise _misfit(call, rank, f"{dtype}, which a float32 sum does not hold")
    return call._replace(shapes=tuple((tuple(x.shape), dtype) for dtype in dtypes), split=tuple(counts))


def of_columns(call: Fingerprint, rank: int, me: int, x: Tensor, widths: Sequence[int]) -> Fingerprint:
    """For a column gather: ``x`` is ``[T, widths[me]]``."""
    _check_counts(call, rank, widths)
    _check(call, rank, x, 1, widths[me], widths)
    return call._replace(shapes=(((x.shape[0], sum(widths)), x.dtype),), split=tuple(widths))


def of_tensor(x: Tensor, root: int) -> Callable[..., Fingerprint]:
    """For a broadcast: any shape, the same on every member."""
    return lambda call, *_: call._replace(shapes=((tuple(x.shape), x.dtype),), root=root)


def of_barrier(call: Fingerprint, *_: object) -> Fingerprint:
    """A barrier has no tensors."""
    return call


def _check_counts(call: Fingerprint, rank: int, counts: Sequence[int]) -> None:
    if len(counts) != call.num_ranks:
        raise _misfit(call, rank, f"{len(counts)} counts for {call.num_ranks} ranks")


def _check(call: Fingerprint, rank: int, x: Tensor, dim: int, size: int, counts: Sequence[int]) -> None:
    if x.dim() != 2 or x.shape[dim] != size:
        what = ("rows", "columns")[dim]
        text = f"a tensor of {tuple(x.shape)}, where the counts {tuple(counts)} say {size} {what}"
        raise _misfit(call, rank, text)


def _misfit(call: Fingerprint, rank: int, what: str) -> CollectiveMismatchError:
    return CollectiveMismatchError(f"rank {rank} came to {call} with {what}")
