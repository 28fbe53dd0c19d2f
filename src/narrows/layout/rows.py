"""Row splits: how many rows each rank holds, in any layout.

Rows are tokens of one step, ordered by attention group, then by position in the batch. A split is stated once, as the
number of rows of each rank when scattered; every other layout's rows follow from it, because the legal layouts are
nested. Nothing is ever assumed even.

>>> from narrows.layout import full, group, owed, scattered
>>> mesh = Mesh.of(dp=2, tp=2)
>>> split = RowSplit.from_groups(mesh, (5, 0))       # one group has five rows, the other none
>>> split.counts
(3, 2, 0, 0)
>>> [split.span(group(mesh), rank) for rank in range(4)]
[(0, 5), (0, 5), (5, 5), (5, 5)]
>>> split.largest(scattered(mesh)), split.largest(full(mesh))
(3, 5)
"""

from __future__ import annotations

from dataclasses import dataclass

from narrows.errors import LayoutError
from narrows.layout.even_split import Span, split_evenly
from narrows.layout.layout import Layout
from narrows.layout.mesh import Mesh

__all__ = ["RowSplit"]


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Rows per rank when scattered; ``counts[rank]`` may be 0."""

    mesh: Mesh
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != self.mesh.size or any(count < 0 for count in self.counts):
            raise LayoutError(f"a row split on {self.mesh} needs {self.mesh.size} counts >= 0, not {self.counts}")

    @classmethod
    def from_groups(cls, mesh: Mesh, group_rows: tuple[int, ...]) -> RowSplit:
        """The split for so many rows per attention group, each group's rows dealt to its ranks as evenly as can be."""
        if len(group_rows) != mesh.num_groups:
            raise LayoutError(
                f"{mesh} has {mesh.num_groups} attention groups, but rows are given for {len(group_rows)}"
            )
        return cls(mesh, tuple(n for rows in group_rows for n in split_evenly(rows, mesh.group_size)))

    @property
    def total(self) -> int:
        """Rows of the step, over all groups."""
        return sum(self.counts)

    def span(self, layout: Layout, rank: int) -> Span:
        """The rows (of all rows in order) that ``rank`` holds, wholly or as an addend, under ``layout``."""
        block = self._block(layout.num_leading)
        first = rank // block * block
        start = sum(self.counts[:first])
        return start, start + sum(self.counts[first : first + block])

    def num_rows(self, layout: Layout, rank: int) -> int:
        """Number of rows that ``rank`` holds under ``layout``."""
        start, stop = self.span(layout, rank)
        return stop - start

    def largest(self, layout: Layout) -> int:
        """Rows of the rank that holds the most under ``layout``: what row-wise work costs."""
        block = self._block(layout.num_leading)
        return max(sum(self.counts[i : i + block]) for i in range(0, len(self.counts), block))

    def at_work(self, layout: Layout) -> float:
        """Rows of the rank that holds the most; or of the mean rank, if that holds less than one, so that some have
        none: ranks that share cores or memory then have the more of it.

        >>> from narrows.layout import full, scattered
        >>> one = RowSplit.from_groups(Mesh.of(dp=1, tp=4), (1,))
        >>> one.at_work(full(one.mesh)), one.at_work(scattered(one.mesh))
        (1, 0.25)
        """
        block = self._block(layout.num_leading)
        mean = self.total * block / len(self.counts)
        return mean if mean < 1 else self.largest(layout)

    def pieces(self, rank: int, outer: Layout, inner: Layout) -> tuple[int, ...]:
        """Rows of each piece into which the rows that ``rank`` holds under ``outer`` fall under ``inner``.

        ``inner`` shards at least the axes that ``outer`` shards. One piece per member of the group of ranks along
        the axes that only ``inner`` shards, in rank order: the counts of a gather, a scatter or a slice.
        """
        block, piece = self._block(outer.num_leading), self._block(inner.num_leading)
        first = rank // block * block
        return tuple(sum(self.counts[i : i + piece]) for i in range(first, first + block, piece))

    def _block(self, num_sharded: int) -> int:
        size = 1
        for axis_size in self.mesh.sizes[num_sharded:]:
            size *= axis_size
        return size
