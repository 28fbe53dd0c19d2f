"""Moves: the single collectives and local operations that change a layout, and which layouts they connect.

A move changes the layout along consecutive axes by ONE operation; several moves in a row are a path that the planner
finds. Every layout of whole rows can be reached from every legal layout. A sum can be taken, but not become owed again.
Columns are only left by a stage whose weights are sharded by column, so a layout with ``P`` or ``C`` is reached only
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

Among ranks on several nodes (:mod:`narrows.layout.topology`) a collective may also be done level by level: inside each
node, and between the nodes by groups of one rank of each. It is a separate move, so that a plan states which it is:

>>> nodes = Topology.parse("2x2")
>>> [str(move) for move in moves_from(mesh, owed(mesh), nodes)][-1]
'all_reduce over dp x tp, hierarchical: (P,P) -> (R,R)'
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from narrows.layout.layout import Layout
from narrows.layout.mesh import Mesh
from narrows.layout.topology import Topology

__all__ = ["Algorithm", "Move", "MoveKind", "moves_from"]


class MoveKind(StrEnum):
    """The operation a move is."""

    SLICE = "slice"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    COLUMN_GATHER = "column_gather"


class Algorithm(StrEnum):
    """How the ranks of a group carry out a collective.

    ``HIERARCHICAL``, for a group with equally many ranks, several, on each of its nodes. ``peers`` are the ranks of
    equal rank on their nodes: one rank of each node. Every piece crosses the network once.

        all_reduce      reduce-scatter in the node, all-reduce of that share among peers, all-gather in the node
        reduce_scatter  reduce-scatter in the node, of the pieces of each rank of a node; then among peers
        all_gather      all-gather among peers, then in the node; column_gather alike
    """

    FLAT = "flat"
    """One collective among all ranks of the group, as the library has it."""
    HIERARCHICAL = "hierarchical"


@dataclass(frozen=True, slots=True)
class Move:
    """One operation from layout ``src`` to layout ``dst`` among the ranks along mesh axes ``first .. last - 1``."""

    mesh: Mesh
    kind: MoveKind
    src: Layout
    dst: Layout
    first: int
    last: int
    algorithm: Algorithm = Algorithm.FLAT

    @property
    def num_ranks(self) -> int:
        """Number of ranks that take part together."""
        return len(self.mesh.group(0, self.first, self.last))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every group that makes this move, all at once."""
        return self.mesh.groups(self.first, self.last)

    @property
    def axes(self) -> str:
        """The axes it runs over, as they are printed: ``tp`` or ``dp x tp``."""
        sizes = self.mesh.sizes[self.first : self.last]
        names = self.mesh.names[self.first : self.last]
        return " x ".join(name for name, size in zip(names, sizes, strict=True) if size > 1)

    def __str__(self) -> str:
        how = "" if self.algorithm is Algorithm.FLAT else f", {self.algorithm}"
        return f"{self.kind} over {self.axes}{how}: {self.src} -> {self.dst}"


@lru_cache(maxsize=4096)
def moves_from(mesh: Mesh, layout: Layout, topology: Topology | None = None) -> tuple[Move, ...]:
    """Every single move that starts at ``layout``, in a fixed order: one at most to each other layout, and after them
    the hierarchical ones that ``topology`` allows (None: all ranks on one node)."""
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
    flat = tuple(found.values())
    if topology is None or topology.is_one_node:
        return flat
    split = (move for move in flat if move.kind is not MoveKind.SLICE and topology.has_two_levels(move.groups))
    return (*flat, *(replace(move, algorithm=Algorithm.HIERARCHICAL) for move in split))
