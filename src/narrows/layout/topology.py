"""Topology: how the ranks of a mesh lie on hosts, and what of a group's traffic has to leave them.

A node is what a fast network connects: a host with NVLink or shared memory inside, or, where NVLink connects several
hosts (GB200 NVL72: 18 trays of 4), all of these. Ranks lie on nodes in order, equally many on each.

>>> from narrows.layout import Mesh
>>> two = Topology.parse("2x4")
>>> two.size, [two.node_of(rank) for rank in range(8)]
(8, [0, 0, 0, 0, 1, 1, 1, 1])
>>> mesh = Mesh.of(dp=2, tp=4)
>>> two.levels(mesh.groups(1, 2))   # along tp: inside a node
(Levels(num_ranks=4, num_nodes=1, per_node=4, sharing=1),)
>>> two.levels(mesh.groups(0, 1))   # along dp: pairs with a rank on each node, four at once
(Levels(num_ranks=2, num_nodes=2, per_node=1, sharing=4),)
>>> two.levels(mesh.groups(0, 2))   # the world
(Levels(num_ranks=8, num_nodes=2, per_node=4, sharing=1),)
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from narrows.errors import ConfigError
from narrows.layout.mesh import Mesh

__all__ = ["Levels", "Topology"]

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Levels:
    """How one group lies on nodes: on how many, with at most how many of its ranks on each, and how many groups use a
    node's network at once (this one counted; 1 where it does not leave its node)."""

    num_ranks: int
    num_nodes: int
    per_node: int
    sharing: int

    @property
    def spans(self) -> bool:
        """Whether the group's ranks lie on several nodes."""
        return self.num_nodes > 1

    @property
    def even(self) -> bool:
        """Whether each of its nodes holds as many of its ranks."""
        return self.num_nodes * self.per_node == self.num_ranks

    @property
    def has_two_levels(self) -> bool:
        """Whether a collective can be done in the nodes and between them: several ranks on each of several nodes."""
        return self.spans and self.per_node > 1 and self.even

    @property
    def within(self) -> Levels:
        """The part of the group on one node."""
        return Levels(self.per_node, 1, self.per_node, 1)

    @property
    def between(self) -> Levels:
        """One rank of the group on each node; as many such groups as it has ranks on a node exchange at once."""
        return Levels(self.num_nodes, self.num_nodes, 1, self.sharing * self.per_node)


@dataclass(frozen=True, slots=True)
class Topology:
    """``num_nodes`` nodes of ``ranks_per_node`` ranks each; rank ``r`` is on node ``r // ranks_per_node``."""

    num_nodes: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            raise ConfigError(f"--nodes {self}: at least 1 node of at least 1 rank is needed")

    @classmethod
    def parse(cls, text: str) -> Topology:
        """The topology written as ``NODESxRANKS``, such as ``2x8``: 2 nodes of 8 ranks.

        Raises:
            ConfigError: the text is not two whole numbers from 1 with an x between them.
        """
        found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
        if found is None:
            raise ConfigError(f"--nodes {text!r}: NODESxRANKS is needed, such as 2x8 for 2 nodes of 8 ranks each")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def one_node(cls, num_ranks: int) -> Topology:
        """All ranks on one node."""
        return cls(1, num_ranks)

    @property
    def size(self) -> int:
        """Number of ranks that it holds."""
        return self.num_nodes * self.ranks_per_node

    @property
    def is_one_node(self) -> bool:
        return self.num_nodes == 1

    def node_of(self, rank: int) -> int:
        """Number of the node that ``rank`` is on."""
        return rank // self.ranks_per_node

    def check(self, mesh: Mesh) -> None:
        """Refuse a mesh that does not fill the nodes.

        Raises:
            ConfigError: with the numbers, and the ``--nodes`` that would hold the mesh.
        """
        if mesh.size != self.size:
            n, per = mesh.size, self.ranks_per_node
            fits = f"{n // per}x{per}" if n % per == 0 else f"{self.num_nodes}x{n // self.num_nodes}"
            works = f"--nodes {fits}" if n % per == 0 or n % self.num_nodes == 0 else f"--nodes 1x{n}"
            raise ConfigError(
                f"--nodes {self} holds {self.size} ranks, but {mesh} has {n}; {works} would hold them, "
                f"or a mesh of {self.size}"
            )

    def holding(self, num_ranks: int) -> Topology:
        """Where the first ``num_ranks`` ranks lie, if they fill nodes or share one.

        Raises:
            ConfigError: they would leave a node half empty, or there are not so many.
        """
        if num_ranks <= self.ranks_per_node:
            return Topology.one_node(num_ranks)
        nodes, rest = divmod(num_ranks, self.ranks_per_node)
        if rest or nodes > self.num_nodes:
            why = f"leaves a node with {rest}" if rest else f"needs {nodes} nodes"
            raise ConfigError(
                f"--nodes {self} holds {self.size} ranks, {self.ranks_per_node} a node; {num_ranks} {why}"
            )
        return Topology(nodes, self.ranks_per_node)

    def levels(self, groups: Groups) -> tuple[Levels, ...]:
        """The ways in which ``groups``, which exchange at once, lie on the nodes: each once, that on most nodes
        first."""
        return _levels(self, groups)

    def levels_along(self, mesh: Mesh, first: int, last: int) -> tuple[Levels, ...]:
        """:meth:`levels` of the groups of ``mesh`` along axes ``first .. last - 1``; found once, and kept."""
        return _levels_along(self, mesh, first, last)

    def has_two_levels(self, groups: Groups) -> bool:
        """Whether a collective among ``groups`` can be done in the nodes and between them: some group spans nodes, and
        all that do have several ranks on each, equally many."""
        spanning = [each for each in self.levels(groups) if each.spans]
        return bool(spanning) and all(each.has_two_levels for each in spanning)

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.ranks_per_node}"


@lru_cache(maxsize=1024)
def _levels_along(topology: Topology, mesh: Mesh, first: int, last: int) -> tuple[Levels, ...]:
    return _levels(topology, mesh.groups(first, last))


def _levels(topology: Topology, groups: Groups) -> tuple[Levels, ...]:
    held = [Counter(map(topology.node_of, ranks)) for ranks in groups]
    leaving = Counter(node for nodes in held if len(nodes) > 1 for node in nodes)
    found = {
        Levels(
            num_ranks=nodes.total(),
            num_nodes=len(nodes),
            per_node=max(nodes.values()),
            sharing=max(leaving[node] for node in nodes) if len(nodes) > 1 else 1,
        )
        for nodes in held
    }
    return tuple(sorted(found, key=lambda each: (-each.num_nodes, -each.num_ranks, -each.per_node, -each.sharing)))
