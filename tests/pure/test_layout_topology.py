"""Properties of topologies: how ranks lie on nodes, and what of a group's traffic leaves them. No torch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.layout import Algorithm, Levels, Mesh, MoveKind, Topology, legal_layouts, moves_from


@st.composite
def placed(draw: st.DrawFn) -> tuple[Mesh, Topology]:
    """A mesh of one to three axes, and nodes that it fills."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    mesh = Mesh(("pod", "dp", "tp")[3 - len(sizes) :], sizes)
    nodes = draw(st.sampled_from([n for n in range(1, mesh.size + 1) if mesh.size % n == 0]))
    return mesh, Topology(nodes, mesh.size // nodes)


def axes(mesh: Mesh) -> list[tuple[int, int]]:
    return [(first, last) for last in range(1, mesh.num_axes + 1) for first in range(last)]


@given(placed())
def test_ranks_fill_the_nodes_in_order(found: tuple[Mesh, Topology]) -> None:
    mesh, nodes = found
    nodes.check(mesh)
    where = [nodes.node_of(rank) for rank in range(mesh.size)]
    assert where == sorted(where)
    assert [where.count(node) for node in range(nodes.num_nodes)] == [nodes.ranks_per_node] * nodes.num_nodes


@given(placed())
def test_groups_are_the_world_and_their_levels_are_counted(found: tuple[Mesh, Topology]) -> None:
    mesh, nodes = found
    for first, last in axes(mesh):
        groups = mesh.groups(first, last)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(mesh.size))
        assert [ranks[0] for ranks in groups] == sorted(ranks[0] for ranks in groups)
        expected = set()
        for ranks in groups:
            on = [[r for r in ranks if nodes.node_of(r) == node] for node in {nodes.node_of(r) for r in ranks}]
            users = [
                sum(
                    len({nodes.node_of(r) for r in other}) > 1
                    and any(nodes.node_of(r) == nodes.node_of(here[0]) for r in other)
                    for other in groups
                )
                for here in on
            ]
            expected.add((len(ranks), len(on), max(map(len, on)), max(users) if len(on) > 1 else 1))
        assert {(e.num_ranks, e.num_nodes, e.per_node, e.sharing) for e in nodes.levels(groups)} == expected


@given(placed())
def test_a_hierarchy_covers_the_group_and_no_rank_twice(found: tuple[Mesh, Topology]) -> None:
    mesh, nodes = found
    for first, last in axes(mesh):
        found_levels = nodes.levels(mesh.groups(first, last))
        for each in found_levels:
            if each.has_two_levels:
                assert each.within.num_ranks * each.between.num_ranks == each.num_ranks
                assert not each.within.spans and each.between.spans
                assert each.between.sharing == each.sharing * each.per_node
                if len(found_levels) == 1:  # else other groups have fewer ranks on a node, and it is an upper bound
                    assert each.between.sharing <= nodes.ranks_per_node


@given(placed())
def test_hierarchical_moves_are_flat_ones_done_otherwise(found: tuple[Mesh, Topology]) -> None:
    mesh, nodes = found
    for layout in legal_layouts(mesh):
        plain = moves_from(mesh, layout)
        moves = moves_from(mesh, layout, nodes)
        assert moves[: len(plain)] == plain, "what one node allows is allowed, and comes first"
        for move in moves[len(plain) :]:
            assert move.algorithm is Algorithm.HIERARCHICAL and move.kind is not MoveKind.SLICE
            (flat,) = (each for each in plain if each.dst == move.dst)
            assert (flat.kind, flat.first, flat.last) == (move.kind, move.first, move.last)
            assert any(each.spans for each in nodes.levels(move.groups))
            assert all(each.has_two_levels for each in nodes.levels(move.groups) if each.spans)


@given(st.integers(1, 32))
def test_on_one_node_nothing_spans(size: int) -> None:
    mesh = Mesh.of(dp=1, tp=size)
    one = Topology.one_node(size)
    assert one.levels(mesh.groups(0, 2)) == (Levels(size, 1, size, 1),)
    for layout in legal_layouts(mesh):
        assert moves_from(mesh, layout, one) == moves_from(mesh, layout)


def test_groups_that_straddle_a_border_are_told_apart() -> None:
    # 3 groups of 4 on 2 nodes of 6: the middle one lies half on each.
    nodes, mesh = Topology(2, 6), Mesh.of(dp=3, tp=4)
    assert nodes.levels(mesh.groups(1, 2)) == (Levels(4, 2, 2, 1), Levels(4, 1, 4, 1))
    assert nodes.has_two_levels(mesh.groups(1, 2))
    # Along dp 2 ranks lie on one node and 1 on the other.
    assert nodes.levels(mesh.groups(0, 1)) == (Levels(3, 2, 2, 4),)
    assert not nodes.has_two_levels(mesh.groups(0, 1))


def test_what_is_written() -> None:
    assert Topology.parse("2x8") == Topology(2, 8) == Topology.parse(str(Topology(2, 8)))
    assert Topology.parse(" 16X1 ").size == 16
    for text in ("", "2", "8x", "x8", "2x8x2", "-2x8", "2.0x8", "axb", "2x9999999"):
        with pytest.raises(ConfigError, match="NODESxRANKS is needed, such as 2x8"):
            Topology.parse(text)
    for text in ("0x8", "2x0"):
        with pytest.raises(ConfigError, match="at least 1 node of at least 1 rank"):
            Topology.parse(text)


def test_a_mesh_that_does_not_fill_the_nodes_is_refused_with_what_would_hold_it() -> None:
    for nodes, mesh, way_out in (
        (Topology(2, 8), Mesh.of(dp=1, tp=8), "--nodes 1x8"),
        (Topology(2, 8), Mesh.of(dp=4, tp=8), "--nodes 4x8"),
        (Topology(2, 8), Mesh.of(dp=2, tp=5), "--nodes 2x5"),
        (Topology(2, 8), Mesh.of(dp=1, tp=7), "--nodes 1x7"),
    ):
        with pytest.raises(ConfigError, match=r"holds 16 ranks, but .* has") as told:
            nodes.check(mesh)
        assert way_out in str(told.value)


def test_a_part_of_the_ranks_fills_nodes_or_shares_one() -> None:
    nodes = Topology(4, 8)
    assert [nodes.holding(n) for n in (1, 5, 8, 16, 32)] == [
        Topology(1, 1),
        Topology(1, 5),
        Topology(1, 8),
        Topology(2, 8),
        Topology(4, 8),
    ]
    with pytest.raises(ConfigError, match="12 leaves a node with 4"):
        nodes.holding(12)
    with pytest.raises(ConfigError, match="40 needs 5 nodes"):
        nodes.holding(40)
