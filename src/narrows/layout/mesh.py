"""The mesh: named axes of ranks, and which ranks form a group along some of them.

Today's meshes have the axes ``dp`` and ``tp``, but nothing here depends on there being two. Axes come in order,
outermost first, and ranks are numbered in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from narrows.errors import ConfigError

__all__ = ["Mesh"]


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes of ranks, outermost first; the last axis is the one attention weights are sharded over.

    >>> mesh = Mesh.of(dp=2, tp=2)
    >>> mesh.size, mesh.coordinates(3), str(mesh)
    (4, (1, 1), 'dp 2 x tp 2')
    >>> mesh.group(0, 1, 2), mesh.group(1, 0, 1), mesh.group(2, 0, 2)   # along tp, along dp, the world
    ((0, 1), (1, 3), (0, 1, 2, 3))
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names:
            raise ConfigError(f"a mesh needs one size per axis, not {self.names} and {self.sizes}")
        for name, size in zip(self.names, self.sizes, strict=True):
            if size < 1:
                raise ConfigError(f"mesh axis {name} has size {size}; every axis needs at least 1 rank")

    @classmethod
    def of(cls, **axes: int) -> Mesh:
        """The mesh with these axes, outermost first: ``Mesh.of(dp=2, tp=4)``."""
        return cls(tuple(axes), tuple(axes.values()))

    @property
    def size(self) -> int:
        """Number of ranks in the world."""
        return prod(self.sizes)

    @property
    def num_axes(self) -> int:
        return len(self.sizes)

    @property
    def num_groups(self) -> int:
        """Number of attention groups: the ranks of one group differ in the last axis only."""
        return prod(self.sizes[:-1])

    @property
    def group_size(self) -> int:
        """Number of ranks in one attention group (``tp``)."""
        return self.sizes[-1]

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Position of ``rank`` along each axis."""
        out: list[int] = []
        for size in reversed(self.sizes):
            rank, coordinate = divmod(rank, size)
            out.append(coordinate)
        return tuple(reversed(out))

    def group(self, rank: int, first: int, last: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along axes ``first .. last - 1``, in rank order, with ``rank``."""
        stride = prod(self.sizes[last:])
        count = prod(self.sizes[first:last])
        block = stride * count
        base = rank // block * block + rank % stride
        return tuple(base + i * stride for i in range(count))

    def groups(self, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        """Every group along axes ``first .. last - 1``, in the order of their first ranks; together they are the world.

        >>> Mesh.of(dp=2, tp=2).groups(0, 1)
        ((0, 2), (1, 3))
        """
        return tuple(self.group(rank, first, last) for rank in range(self.size) if self._leads(rank, first, last))

    def _leads(self, rank: int, first: int, last: int) -> bool:
        """Whether ``rank`` is the first of its group."""
        return not any(self.coordinates(rank)[first:last])

    def group_of(self, rank: int) -> int:
        """Index of the attention group that ``rank`` belongs to."""
        return rank // self.group_size

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))
