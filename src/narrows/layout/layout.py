"""Layouts: one placement per mesh axis, which of them are legal, and their canonical form.

The placements are DTensor's, plus ``C``:

    R   replicated: every rank along the axis holds the same rows
    S   sharded: each rank along the axis holds its own rows
    P   partial: each rank holds an addend of a sum that is still owed
    C   columns: all the rows, some of the columns
    -   nothing to say: the axis has one rank

The legal layouts for dp 2 x tp 2 and the rows a b c d, drawn rank by rank. A number after ``'`` is an addend of an owed
sum, one after ``|`` a piece of the columns:

>>> mesh = Mesh.of(dp=2, tp=2)
>>> for layout in legal_layouts(mesh):
...     print(layout, f"{layout.title(mesh):<9}", picture(mesh, layout))
(R,R) FULL      abcd abcd abcd abcd
(P,P)           abcd'1 abcd'2 abcd'3 abcd'4
(C,C)           abcd|1 abcd|2 abcd|3 abcd|4
(S,R) GROUP     ab ab cd cd
(S,P)           ab'1 ab'2 cd'1 cd'2
(S,C)           ab|1 ab|2 cd|1 cd|2
(S,S) SCATTERED a b c d

(R,S), (P,S) and (R,P) would interleave rows, or sum over ranks that hold different ones:

>>> Layout.on(mesh, "RS")
Traceback (most recent call last):
    ...
narrows.errors.LayoutError: layout (R,S) is not legal on dp 2 x tp 2: sharded axes come first, then one of R, P or C

An axis of one rank has no placement. Without this rule phantom sums appear: at tp 1 attention owes nothing.

>>> one = Mesh.of(dp=4, tp=1)
>>> group(one) == scattered(one) == Layout.on(one, "SP")
True
>>> print(Layout.on(one, "SP"))
(S,-)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from narrows.errors import LayoutError
from narrows.layout.mesh import Mesh

__all__ = ["Layout", "full", "group", "legal_layouts", "owed", "picture", "scattered"]

TAILS = "RPC"


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """A legal, canonical layout; make one with :meth:`on`, so that equal layouts are equal values."""

    placements: str

    @classmethod
    def on(cls, mesh: Mesh, placements: str) -> Layout:
        """The canonical form of ``placements`` (one letter per axis) on ``mesh``.

        Raises:
            LayoutError: the letters are not a legal layout of this mesh.
        """
        if len(placements) != mesh.num_axes or set(placements) - set("RSPC-"):
            raise LayoutError(f"layout {placements!r} needs one of R, S, P, C for each axis of {mesh}")
        real = [p for p, size in zip(placements, mesh.sizes, strict=True) if size > 1]
        tail = [p for p in real if p != "S"]
        if "-" in real or real[: len(real) - len(tail)] != ["S"] * (len(real) - len(tail)) or len(set(tail)) > 1:
            shown = ",".join(placements)
            raise LayoutError(
                f"layout ({shown}) is not legal on {mesh}: sharded axes come first, then one of R, P or C"
            )
        return cls("".join(p if size > 1 else "-" for p, size in zip(placements, mesh.sizes, strict=True)))

    @property
    def num_leading(self) -> int:
        """Number of leading axes over which rows are sharded (axes of one rank counted along)."""
        for i, placement in enumerate(self.placements):
            if placement in TAILS:
                return i
        return len(self.placements)

    @property
    def tail(self) -> str:
        """The placement of the axes after the sharded ones: ``R``, ``P``, ``C``, or ``''`` when all are sharded."""
        return self.placements[self.num_leading] if self.num_leading < len(self.placements) else ""

    @property
    def owes_sum(self) -> bool:
        """Whether ranks hold addends of a sum that was not taken yet."""
        return "P" in self.placements

    @property
    def holds_columns(self) -> bool:
        """Whether ranks hold only some of the columns."""
        return "C" in self.placements

    @property
    def is_whole(self) -> bool:
        """Whether each rank holds whole, finished rows: what a row stage may read."""
        return not (self.owes_sum or self.holds_columns)

    def title(self, mesh: Mesh) -> str:
        """FULL, GROUP or SCATTERED, the first that fits; empty for the others."""
        for name, layout in (("FULL", full(mesh)), ("GROUP", group(mesh)), ("SCATTERED", scattered(mesh))):
            if self == layout:
                return name
        return ""

    def __str__(self) -> str:
        return f"({','.join(self.placements)})"


def full(mesh: Mesh) -> Layout:
    """Every rank holds all rows: what MLP, experts and LM head read."""
    return Layout.on(mesh, "R" * mesh.num_axes)


def group(mesh: Mesh) -> Layout:
    """Every rank of an attention group holds the group's rows: what attention reads."""
    return Layout.on(mesh, "S" * (mesh.num_axes - 1) + "R")


def scattered(mesh: Mesh) -> Layout:
    """Every rank holds its own rows: where row-wise work is cheapest."""
    return Layout.on(mesh, "S" * mesh.num_axes)


def owed(mesh: Mesh, num_sharded: int = 0) -> Layout:
    """A sum owed over all axes after the first ``num_sharded``, over which rows are sharded.

    ``owed(mesh)`` is what MLP and experts leave, ``owed(mesh, mesh.num_axes - 1)`` what attention leaves.
    """
    return Layout.on(mesh, "S" * num_sharded + "P" * (mesh.num_axes - num_sharded))


@lru_cache(maxsize=256)
def legal_layouts(mesh: Mesh) -> tuple[Layout, ...]:
    """All canonical layouts of ``mesh``, those with the fewest sharded axes first."""
    seen: dict[Layout, None] = {}
    for num_sharded in range(mesh.num_axes + 1):
        for tail in TAILS:
            seen[Layout.on(mesh, "S" * num_sharded + tail * (mesh.num_axes - num_sharded))] = None
    return tuple(seen)


def picture(mesh: Mesh, layout: Layout, rows: str = "") -> str:
    """What each rank holds under ``layout``, one word per rank: the pictures of this file and of the docs."""
    rows = rows or "abcdefghijklmnopqrstuvwxyz"[: mesh.size]
    first = layout.num_leading
    words: list[str] = []
    for rank in range(mesh.size):
        block = mesh.group(rank, first, mesh.num_axes)
        mark = {"P": "'", "C": "|"}.get(layout.tail, "")
        held = "".join(rows[r] for r in block)
        words.append(held + (f"{mark}{block.index(rank) + 1}" if mark else ""))
    return " ".join(words)
