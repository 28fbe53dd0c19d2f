"""Moves of a plan, bound to a communicator: one callable per move and rank.

The ranks, the label and the collective are fixed when a mover is made. The row counts, which change from step to step,
come as a :class:`Geometry` that is computed once per step.

Also here, for tests and `verify`: the whole tensor from every rank's local one, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.comm.communicator import Communicator
from narrows.comm.sums import sum_rows
from narrows.comm.transport import RowNorm
from narrows.errors import LayoutError
from narrows.layout import Algorithm, Layout, Move, MoveKind, RowSplit, scattered, split_evenly, starts

__all__ = ["Geometry", "Mover", "assemble", "scatter"]


class Geometry(NamedTuple):
    """The row counts of one move in one step, seen from one rank."""

    pieces: tuple[int, ...]
    """Rows per member of the group. For a column gather, whose members all hold the same rows: that number, once."""
    start: int
    """First of this rank's own rows, counted within the rows of the whole group."""
    stop: int
    """One past the last of them. Addends of a reduction have ``stop - start`` rows: these."""


class Mover:
    """One move of a plan, on one rank.

    Args:
        columns: columns per rank of the world; only read, and then needed, for a column gather.

    Raises:
        LayoutError: the move is of another mesh than the communicator, or a column gather lacks its columns.
    """

    def __init__(self, comm: Communicator, move: Move, label: str, columns: tuple[int, ...] | None = None) -> None:
        if move.mesh != comm.mesh:
            raise LayoutError(f"{move} is a move on {move.mesh}, but the communicator is {comm.mesh}")
        self.move = move
        self.label = label
        self.ranks = move.mesh.group(comm.rank, move.first, move.last)
        self.widths: tuple[int, ...] = ()
        self._comm = comm
        self._me = self.ranks.index(comm.rank)
        self._levels = move.algorithm is Algorithm.HIERARCHICAL
        if move.kind is MoveKind.COLUMN_GATHER:
            if columns is None or len(columns) != comm.mesh.size:
                raise LayoutError(f"{move} needs the columns of each of {comm.mesh.size} ranks, not {columns}")
            self.widths = tuple(columns[rank] for rank in self.ranks)
        run: dict[MoveKind, Callable[[Sequence[Tensor], Geometry, Sequence[Tensor]], list[Tensor]]] = {
            MoveKind.SLICE: self._slice,
            MoveKind.ALL_GATHER: self._all_gather,
            MoveKind.REDUCE_SCATTER: self._reduce_scatter,
            MoveKind.ALL_REDUCE: self._all_reduce,
            MoveKind.COLUMN_GATHER: self._column_gather,
        }
        self._run = run[move.kind]

    def geometry(self, split: RowSplit) -> Geometry:
        """This rank's counts under ``split``: equal for all movers of equal ``(move.src, move.dst)``."""
        move, rank = self.move, self._comm.rank
        if move.kind is MoveKind.COLUMN_GATHER:
            rows = split.num_rows(move.src, rank)
            return Geometry((rows,), 0, rows)
        outer, inner = move.src, move.dst
        if move.kind is MoveKind.ALL_GATHER:
            outer, inner = move.dst, move.src
        elif move.kind is MoveKind.ALL_REDUCE:
            inner = scattered(move.mesh)  # its source and target hold the same rows; each member sums its own
        pieces = split.pieces(rank, outer, inner)
        return Geometry(pieces, *starts(pieces)[self._me])

    def __call__(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor] = ()) -> list[Tensor]:
        """Makes the move; one tensor per field.

        A slice is a view of its input and needs no collective. Every other result is the caller's own memory.

        Args:
            xs: one 2-D tensor per field; a reduction and a column gather take exactly one.
            addends: only for reductions: tensors of this rank's own rows that join its sum.
        """
        return self._run(xs, geometry, addends)

    def reduce_norm(
        self, x: Tensor, geometry: Geometry, addends: Sequence[Tensor], norm: RowNorm
    ) -> tuple[Tensor, Tensor] | None:
        """An all-reduce and the norm of its rows in one pass.

        Returns:
            (normed, the norm's input); None where the transport has no such kernel: then nothing has been sent.
        """
        return self._comm.all_reduce_norm(x, self.ranks, geometry.pieces, self.label, addends, norm)

    def _slice(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        assert not addends, f"{self.label}: a slice takes no sum that an addend could join"
        _, start, stop = geometry
        return [x[start:stop] for x in xs]

    def _all_gather(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        assert not addends, f"{self.label}: a gather takes no sum that an addend could join"
        return self._comm.all_gather(xs, self.ranks, geometry.pieces, self.label, levels=self._levels)

    def _reduce_scatter(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        (x,) = xs
        reduce = self._comm.reduce_scatter
        return [reduce(x, self.ranks, geometry.pieces, self.label, addends, levels=self._levels)]

    def _all_reduce(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        (x,) = xs
        reduce = self._comm.all_reduce
        return [reduce(x, self.ranks, geometry.pieces, self.label, addends, levels=self._levels)]

    def _column_gather(self, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        assert not addends, f"{self.label}: a gather takes no sum that an addend could join"
        (x,) = xs
        return [self._comm.column_gather(x, self.ranks, self.widths, self.label, levels=self._levels)]


def assemble(
    layout: Layout, split: RowSplit, shards: Sequence[Tensor], columns: tuple[int, ...] | None = None
) -> Tensor:
    """The full tensor ``[T, W]``, as a single rank would hold it, from every rank's local one.

    Rows that several ranks hold are read from the first of them; an owed sum is taken in float32 in rank order and
    rounded once; columns are laid side by side.

    Args:
        shards: ``shards[rank]``, ``[split.num_rows(layout, rank), W]`` (``columns[rank]`` wide where they are cut).
        columns: columns per rank of the world; if given, the shards are checked against them.

    Raises:
        LayoutError: a local tensor has another number of rows, or columns, than the layout says; the rank is named.
    """
    mesh = split.mesh
    if len(shards) != mesh.size:
        raise LayoutError(f"{mesh} has {mesh.size} ranks, but there are {len(shards)} local tensors")
    for rank, shard in enumerate(shards):
        rows = split.num_rows(layout, rank)
        if shard.shape[0] != rows:
            raise LayoutError(f"rank {rank} holds {shard.shape[0]} rows, but {layout} with {split.counts} says {rows}")
        if columns is not None and layout.holds_columns and shard.shape[1] != columns[rank]:
            raise LayoutError(f"rank {rank} holds {shard.shape[1]} columns, but its share of them is {columns[rank]}")
    blocks = [[shards[rank] for rank in block] for block in _blocks(layout, split)]
    if layout.owes_sum:
        return torch.cat([sum_rows(block, 0, block[0].shape[0]) for block in blocks])
    if layout.holds_columns:
        return torch.cat([torch.cat(block, dim=1) for block in blocks])
    return torch.cat([block[0] for block in blocks])


def scatter(layout: Layout, split: RowSplit, full: Tensor, columns: tuple[int, ...] | None = None) -> list[Tensor]:
    """Every rank's local tensor from the full one ``[T, W]``; :func:`assemble` gives it back bit for bit.

    An owed sum of v is held as 2 v by one member, -v by the next, 0 by the others, in turn from element to element:
    no member holds v, and every order and grouping of the additions is exact in every dtype (short of overflow).

    Args:
        columns: columns per rank of the world; None deals them as evenly as they go.

    Raises:
        LayoutError: the rows, or a block's columns, do not add up to those of ``full``.
    """
    if full.shape[0] != split.total:
        raise LayoutError(f"the tensor has {full.shape[0]} rows, but the split says {split.total}")
    shards: list[Tensor] = []
    for block in _blocks(layout, split):
        start, stop = split.span(layout, block[0])
        rows = full[start:stop]
        if layout.owes_sum:
            shards += _addends(rows, len(block), start)
        elif layout.holds_columns:
            widths = (
                split_evenly(full.shape[1], len(block)) if columns is None else tuple(columns[rank] for rank in block)
            )
            if sum(widths) != full.shape[1]:
                raise LayoutError(f"ranks {block} hold {widths} columns, but the tensor has {full.shape[1]}")
            shards += [rows[:, lo:hi].clone(memory_format=torch.contiguous_format) for lo, hi in starts(widths)]
        else:
            shards += [rows.clone() for _ in block]
    return shards


def _blocks(layout: Layout, split: RowSplit) -> list[tuple[int, ...]]:
    """The groups of ranks that hold the same rows, in rank order."""
    mesh = split.mesh
    blocks = [mesh.group(rank, layout.num_leading, mesh.num_axes) for rank in range(mesh.size)]
    return list(dict.fromkeys(blocks))


def _addends(rows: Tensor, num: int, first_row: int) -> list[Tensor]:
    cells = torch.arange(rows.shape[0]).unsqueeze(1) + torch.arange(rows.shape[1]) + first_row
    zero = torch.zeros_like(rows)
    twice = [torch.where(cells % num == i, rows + rows, zero) for i in range(num)]
    minus = [torch.where((cells + 1) % num == i, rows, zero) for i in range(num)]
    return [a - b for a, b in zip(twice, minus, strict=True)]
