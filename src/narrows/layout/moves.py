"""Moves: the single collectives and local operations that change a layout, and which layouts they connect.

A move changes the layout along consecutive axes by ONE operation; several moves in a row are a path that the planner
finds. Every layout of whole rows can be reached from every legal layout. A sum can be taken but not owed anew, and
columns are only left by a stage whose weights are sharded by column, so a layout with ``P`` or ``C`` is reached only
where fewer axes owe the sum: (P,P) -> (S,P).

    slice           (S*,R) -> more S      local: each rank keeps its own rows
    all_gather      more S -> (S*,R)      rows of the ranks along the axes
    reduce_scatter  (S*,P) -> more S      takes the owed sum; each rank keeps its own rows of it
    all_reduce      (S*,P) -> (S*,R)      takes the owed sum; every rank keeps all of it
    column_gather   (S*,C) -> (S*,R)      columns of the ranks along the axes

>>> from narrows.layout import full, group, owed, scattered
>>> mesh = Mesh.of(dp=2, tp=2)
>>> for move in moves_from(mesh, owed(mesh)):
...     print(move)
reduce_scatter over dp: (P,P) -> (S,P)
reduce_scatter over dp x tp: (P,P) -> (S,S)
all_reduce over dp x tp: (P,P) -> (R,R)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from narrows.layout.layout import Layout
from narrows.layout.mesh import Mesh

__all__ = ["Move", "MoveKind", "moves_from"]


class MoveKind(StrEnum):
    """The operation a move is."""

    SLICE = "slice"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    COLUMN_GATHER = "column_gather"


@dataclass(frozen=True, slots=True)
class Move:
    """One operation from layout ``src`` to layout ``dst`` among the ranks along mesh axes ``first .. last - 1``."""

    mesh: Mesh
    kind: MoveKind
    src: Layout
    dst: Layout
    first: int
    last: int

    @property
    def num_ranks(self) -> int:
        """Number of ranks that take part together."""
        return len(self.mesh.group(0, self.first, self.last))

    @property
    def axes(self) -> str:
        """The axes it runs over, as they are printed: ``tp`` or ``dp x tp``."""
        sizes = self.mesh.sizes[self.first : self.last]
        names = self.mesh.names[self.first : self.last]
        return " x ".join(name for name, size in zip(names, sizes, strict=True) if size > 1)

    def __str__(self) -> str:
        return f"{self.kind} over {self.axes}: {self.src} -> {self.dst}"


@lru_cache(maxsize=4096)
def moves_from(mesh: Mesh, layout: Layout) -> tuple[Move, ...]:
    """Every single move that starts at ``layout``, in a fixed order: one at most to each other layout."""
    first, tail, end = layout.num_leading, layout.tail, mesh.num_axes
    found: dict[Layout, Move] = {}

    def offer(kind: MoveKind, placements: str, lo: int, hi: int) -> None:
        dst = Layout.on(mesh, placements)
        if dst != layout and dst not in found:
            found[dst] = Move(mesh, kind, layout, dst, lo, hi)

    if tail == "R":
        for last in range(first + 1, end + 1):
            offer(MoveKind.SLICE, "S" * last + "R" * (end - last), first, last)
    if tail == "P":
        for last in range(first + 1, end + 1):
            offer(MoveKind.REDUCE_SCATTER, "S" * last + "P" * (end - last), first, last)
        offer(MoveKind.ALL_REDUCE, "S" * first + "R" * (end - first), first, end)
    if tail == "C":
        offer(MoveKind.COLUMN_GATHER, "S" * first + "R" * (end - first), first, end)
    if tail in ("R", ""):
        for start in range(first):
            offer(MoveKind.ALL_GATHER, "S" * start + "R" * (end - start), start, first)
    return tuple(found.values())
