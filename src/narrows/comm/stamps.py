"""What a rank says of the collective it comes to, and the sentence that tells differing sayings apart.

Knows numbers, labels, shapes and dtypes; reads no tensor data and moves nothing. For every implementation of the World
protocol, so that a mismatch reads the same wherever it happens. The ``say_*`` functions are for checked mode: they add
shapes to a stamp, and refuse a tensor that does not fit the counts it came with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.errors import CollectiveMismatchError

__all__ = ["Stamp", "absence", "mismatch", "rank_names", "say_columns", "say_rows", "say_sum", "say_tensor"]


class Stamp(NamedTuple):
    """One rank's saying.

    >>> print(Stamp(17, "all_reduce", "layer 3 post_attn_norm", 2, (((5, 64), torch.float32),), (3, 2)))
    #17 all_reduce "layer 3 post_attn_norm" [5 x 64 float32] split 3+2
    >>> print(Stamp(4, "barrier", "step 1", 2))
    #4 barrier "step 1"
    """

    number: int
    """How many collectives this rank has come to before in this group."""
    op: str
    label: str
    num_ranks: int
    """Size of the group."""
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shape and dtype per field of what the members make together; left empty when not in checked mode."""
    split: tuple[int, ...] = ()
    """Rows, or columns, per member."""
    root: int | None = None
    call: int = 0
    """Which call of the engine it belongs to, counted by the rank: a rank that lost a whole call is seen at once."""

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


def rank_names(ranks: Sequence[int]) -> str:
    """``rank 2``, or ``ranks 0, 1, 3``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def mismatch(ranks: Sequence[int], stamps: Sequence[Stamp]) -> str:
    """Who came with what, the fewest first; empty when all stamps are equal.

    >>> a, b = Stamp(0, "barrier", "step 1", 3), Stamp(0, "barrier", "step 2", 3)
    >>> mismatch((0, 1, 2), (a, b, a))
    'rank 1 came to #0 barrier "step 2", ranks 0, 2 to #0 barrier "step 1"'
    """
    first = stamps[0]
    if all(stamp == first for stamp in stamps):
        return ""
    if len({stamp.call for stamp in stamps}) == 1:
        stamps = [stamp._replace(call=0) for stamp in stamps]  # what is the same everywhere explains nothing
    came: dict[Stamp, list[int]] = {}
    for rank, stamp in zip(ranks, stamps, strict=True):
        came.setdefault(stamp, []).append(rank)
    said = sorted(came.items(), key=lambda item: (len(item[1]), item[1]))
    return ", ".join(
        f"{rank_names(members)} {'to' if i else 'came to'} {stamp}" for i, (stamp, members) in enumerate(said)
    )


def absence(waiting: Sequence[tuple[int, Stamp]], missing: Mapping[int, tuple[Stamp, tuple[int, ...]] | None]) -> str:
    """Who waits at what, and where those who are missing came last, with the group that they met there.

    >>> start, step = Stamp(0, "barrier", "start", 2), Stamp(1, "barrier", "step 1", 2)
    >>> absence([(0, step)], {1: (start, (0, 1))})
    'rank 0 waits at #1 barrier "step 1"; rank 1 last came to #0 barrier "start" of ranks 0, 1'
    """
    told = [f"rank {rank} waits at {stamp}" for rank, stamp in waiting]
    for rank, last in missing.items():
        where = f"last came to {last[0]} of {rank_names(last[1])}" if last else "never came"
        told.append(f"rank {rank} {where}")
    return "; ".join(told)


def say_rows(stamp: Stamp, rank: int, me: int, xs: Sequence[Tensor], counts: Sequence[int]) -> Stamp:
    """For a gather: each of ``xs`` is ``[counts[me], W_f]``.

    Raises:
        CollectiveMismatchError: a tensor does not fit the counts, or the counts do not fit the group. So for all of
            the ``say_*`` functions.
    """
    _check_counts(stamp, rank, counts)
    for x in xs:
        _check(stamp, rank, x, 0, counts[me], counts)
    return stamp._replace(shapes=tuple(((sum(counts), x.shape[1]), x.dtype) for x in xs), split=tuple(counts))


def say_sum(
    stamp: Stamp, rank: int, me: int, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor] = ()
) -> Stamp:
    """For a reduction: ``x`` is ``[sum(counts), W]``, each addend ``[counts[me], W]``, all of at most 32 bits.

    The members' addends of one kind are a field like ``x``: every rank joins as many, of the same dtypes.
    """
    _check_counts(stamp, rank, counts)
    _check(stamp, rank, x, 0, sum(counts), counts)
    piece = (counts[me], x.shape[1])
    for addend in addends:
        if tuple(addend.shape) != piece:
            raise _misfit(stamp, rank, f"an addend of {tuple(addend.shape)} for a piece of {piece}")
    for dtype in (x.dtype, *(addend.dtype for addend in addends)):
        if not dtype.is_floating_point or dtype.itemsize > 4:
            raise _misfit(stamp, rank, f"{dtype}, which a float32 sum does not hold")
    fields = (x.dtype, *(addend.dtype for addend in addends))
    return stamp._replace(shapes=tuple((tuple(x.shape), dtype) for dtype in fields), split=tuple(counts))


def say_columns(stamp: Stamp, rank: int, me: int, x: Tensor, widths: Sequence[int]) -> Stamp:
    """For a column gather: ``x`` is ``[T, widths[me]]``."""
    _check_counts(stamp, rank, widths)
    _check(stamp, rank, x, 1, widths[me], widths)
    return stamp._replace(shapes=(((x.shape[0], sum(widths)), x.dtype),), split=tuple(widths))


def say_tensor(stamp: Stamp, x: Tensor, root: int) -> Stamp:
    """For a broadcast: any shape, the same on every member."""
    return stamp._replace(shapes=((tuple(x.shape), x.dtype),), root=root)


def _check_counts(stamp: Stamp, rank: int, counts: Sequence[int]) -> None:
    if len(counts) != stamp.num_ranks:
        raise _misfit(stamp, rank, f"{len(counts)} counts for {stamp.num_ranks} ranks")


def _check(stamp: Stamp, rank: int, x: Tensor, dim: int, size: int, counts: Sequence[int]) -> None:
    if x.dim() != 2 or x.shape[dim] != size:
        what = ("rows", "columns")[dim]
        text = f"a tensor of {tuple(x.shape)}, where the counts {tuple(counts)} say {size} {what}"
        raise _misfit(stamp, rank, text)


def _misfit(stamp: Stamp, rank: int, what: str) -> CollectiveMismatchError:
    return CollectiveMismatchError(f"rank {rank} came to {stamp} with {what}")
