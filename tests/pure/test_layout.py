"""Properties of the layout room, over meshes of one to three axes and any row split. No torch."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import paths_from

from narrows.errors import ConfigError, LayoutError
from narrows.layout import (
    Layout,
    Mesh,
    Move,
    MoveKind,
    RowSplit,
    full,
    group,
    legal_layouts,
    moves_from,
    owed,
    picture,
    scattered,
    split_evenly,
    starts,
)

NAMES = ("pod", "dp", "tp")
MESHES = [
    Mesh(NAMES[3 - len(sizes) :], sizes)
    for n in (1, 2, 3)
    for sizes in itertools.product((1, 2, 3), repeat=n)
]  # fmt: skip

meshes = st.sampled_from(MESHES)


@st.composite
def splits(draw: st.DrawFn) -> RowSplit:
    mesh = draw(meshes)
    return RowSplit(mesh, tuple(draw(st.lists(st.integers(0, 9), min_size=mesh.size, max_size=mesh.size))))


def real(mesh: Mesh, placements: str) -> str:
    """The letters of the axes that have more than one rank."""
    return "".join(p for p, size in zip(placements, mesh.sizes, strict=True) if size > 1)


# --- dealing and meshes


@given(st.integers(0, 5000), st.integers(1, 64))
def test_split_evenly_gives_whole_units(units: int, parts: int) -> None:
    shares = split_evenly(units, parts)
    assert len(shares) == parts and sum(shares) == units
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_starts_lay_the_shares_end_to_end(counts: list[int]) -> None:
    spans = starts(tuple(counts))
    assert [stop - start for start, stop in spans] == counts
    assert spans[0][0] == 0 and spans[-1][1] == sum(counts)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_coordinates_number_the_ranks_row_major(mesh: Mesh) -> None:
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert coordinates == list(itertools.product(*(range(size) for size in mesh.sizes)))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_group_is_the_ranks_that_differ_only_along_its_axes(mesh: Mesh) -> None:
    for first, last in itertools.combinations(range(mesh.num_axes + 1), 2):
        for rank in range(mesh.size):
            here = mesh.coordinates(rank)
            alike = [
                other
                for other in range(mesh.size)
                if mesh.coordinates(other)[:first] == here[:first] and mesh.coordinates(other)[last:] == here[last:]
            ]
            assert mesh.group(rank, first, last) == tuple(alike)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_attention_groups_are_the_ranks_along_the_last_axis(mesh: Mesh) -> None:
    assert mesh.num_groups * mesh.group_size == mesh.size
    for rank in range(mesh.size):
        members = mesh.group(rank, mesh.num_axes - 1, mesh.num_axes)
        assert {mesh.group_of(member) for member in members} == {mesh.group_of(rank)}


def test_a_mesh_needs_ranks_and_a_size_per_axis() -> None:
    with pytest.raises(ConfigError, match="axis tp has size 0"):
        Mesh.of(dp=2, tp=0)
    with pytest.raises(ConfigError, match="one size per axis"):
        Mesh(("dp", "tp"), (2,))
    with pytest.raises(ConfigError, match="one size per axis"):
        Mesh((), ())


# --- layouts


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_legal_is_sharded_axes_first_then_one_other_placement(mesh: Mesh) -> None:
    found = set()
    for letters in itertools.product("RSPC", repeat=mesh.num_axes):
        placements = "".join(letters)
        if re.fullmatch(r"S*(R*|P*|C*)", real(mesh, placements)):
            found.add(Layout.on(mesh, placements))
        else:
            with pytest.raises(LayoutError) as told:
                Layout.on(mesh, placements)
            assert ",".join(placements) in str(told.value) and str(mesh) in str(told.value)
    assert found == set(legal_layouts(mesh))
    assert len(legal_layouts(mesh)) == len(found) == 3 * sum(size > 1 for size in mesh.sizes) + 1


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_canonical_form_omits_axes_of_one_rank(mesh: Mesh) -> None:
    for layout in legal_layouts(mesh):
        assert Layout.on(mesh, layout.placements) == layout
        assert [p == "-" for p in layout.placements] == [size == 1 for size in mesh.sizes]
        for letters in itertools.product("RSPC-", repeat=mesh.num_axes):
            if real(mesh, "".join(letters)) == real(mesh, layout.placements):
                assert Layout.on(mesh, "".join(letters)) == layout
        assert layout.owes_sum == (layout.tail == "P") == ("P" in layout.placements)
        assert layout.holds_columns == (layout.tail == "C")
        assert layout.is_whole == (layout.tail in ("", "R"))


@pytest.mark.parametrize("placements", ["", "R", "RRR", "RX", "rr", "--", "-R", "S-"])
def test_letters_that_are_no_placements_are_refused(placements: str) -> None:
    with pytest.raises(LayoutError):
        Layout.on(Mesh.of(dp=2, tp=2), placements)


def test_one_rank_owes_nothing() -> None:
    mesh = Mesh.of(dp=1, tp=1)
    assert legal_layouts(mesh) == (full(mesh),)
    assert full(mesh) == group(mesh) == scattered(mesh) == owed(mesh) == Layout.on(mesh, "CC")
    assert full(mesh).is_whole


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_named_layouts(mesh: Mesh) -> None:
    assert full(mesh).title(mesh) == "FULL"
    assert scattered(mesh).is_whole and group(mesh).is_whole
    if mesh.group_size > 1:
        assert owed(mesh, mesh.num_axes - 1).owes_sum
    else:
        assert owed(mesh, mesh.num_axes - 1) == group(mesh) == scattered(mesh)
    for layout in legal_layouts(mesh):
        rows = "abcdefghijklmnopqrstuvwxyzA"[: mesh.size]
        assert len(picture(mesh, layout, rows).split()) == mesh.size


# --- row splits


@given(splits())
def test_the_spans_of_a_layout_partition_the_rows(split: RowSplit) -> None:
    mesh = split.mesh
    for layout in legal_layouts(mesh):
        at = 0
        sharers: dict[tuple[int, ...], set[tuple[int, int]]] = {}
        for rank in range(mesh.size):
            block = mesh.group(rank, layout.num_leading, mesh.num_axes)
            span = split.span(layout, rank)
            sharers.setdefault(block, set()).add(span)
            if rank == block[0]:
                assert span[0] == at
                at = span[1]
            assert split.num_rows(layout, rank) == span[1] - span[0] <= split.largest(layout)
        assert at == split.total
        assert all(len(spans) == 1 for spans in sharers.values())
        assert split.largest(layout) == max(split.num_rows(layout, rank) for rank in range(mesh.size))


@given(splits())
def test_pieces_are_the_parts_of_the_group_members(split: RowSplit) -> None:
    mesh = split.mesh
    for outer, inner in itertools.product(legal_layouts(mesh), repeat=2):
        if outer.num_leading > inner.num_leading:
            continue
        for rank in range(mesh.size):
            members = mesh.group(rank, outer.num_leading, inner.num_leading)
            pieces = split.pieces(rank, outer, inner)
            assert sum(pieces) == split.num_rows(outer, rank)
            assert pieces == tuple(split.num_rows(inner, member) for member in members)


@given(meshes, st.data())
def test_groups_split_their_rows_over_their_ranks(mesh: Mesh, data: st.DataObject) -> None:
    rows = st.lists(st.integers(0, 2000), min_size=mesh.num_groups, max_size=mesh.num_groups)
    group_rows = tuple(data.draw(rows))
    split = RowSplit.from_groups(mesh, group_rows)
    assert split.total == sum(group_rows)
    for rank in range(mesh.size):
        assert split.num_rows(group(mesh), rank) == group_rows[mesh.group_of(rank)]
        assert split.counts[rank] in (
            group_rows[mesh.group_of(rank)] // mesh.group_size,
            -(-group_rows[mesh.group_of(rank)] // mesh.group_size),
        )


def test_a_split_that_does_not_fit_the_mesh_is_refused() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    for counts in ((1, 2, 3), (1, 2, 3, -1)):
        with pytest.raises(LayoutError, match="needs 4 counts"):
            RowSplit(mesh, counts)
    with pytest.raises(LayoutError, match="2 attention groups, but rows are given for 3"):
        RowSplit.from_groups(mesh, (1, 2, 3))


# --- moves and routes


def expected_kind(move: Move) -> MoveKind:
    """The move that two layouts imply."""
    src, dst = move.src, move.dst
    if src.owes_sum:
        return MoveKind.ALL_REDUCE if dst.num_leading == src.num_leading else MoveKind.REDUCE_SCATTER
    if src.holds_columns:
        return MoveKind.COLUMN_GATHER
    return MoveKind.SLICE if dst.num_leading > src.num_leading else MoveKind.ALL_GATHER


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_moves_go_between_legal_layouts_by_the_operation_they_need(mesh: Mesh) -> None:
    legal = set(legal_layouts(mesh))
    for layout in legal:
        moves = moves_from(mesh, layout)
        assert len({move.dst for move in moves}) == len(moves)
        for move in moves:
            assert move.src == layout and move.dst in legal and move.dst != layout
            assert move.kind is expected_kind(move)
            assert move.num_ranks > 1 and move.axes
            # the operation runs along the axes that change, and no other
            lo, hi = sorted((move.src.num_leading, move.dst.num_leading))
            if lo == hi:
                lo, hi = move.src.num_leading, mesh.num_axes
            for rank in range(mesh.size):
                assert mesh.group(rank, move.first, move.last) == mesh.group(rank, lo, hi)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_only_whole_rows_and_smaller_sums_are_reachable_from_every_layout(mesh: Mesh) -> None:
    for src, dst in itertools.product(legal_layouts(mesh), repeat=2):
        less_owed = src.owes_sum and dst.owes_sum and dst.num_leading >= src.num_leading
        possible = src == dst or dst.is_whole or less_owed
        path = paths_from(mesh, src).get(dst)
        assert (path is not None) == possible
        if path is not None:
            assert [move.src for move in path] + [dst] == [src] + [move.dst for move in path]
            assert len(path) <= 2, "one move to finished rows, one to where they are wanted"


def test_three_axes() -> None:
    mesh = Mesh.of(pod=2, dp=2, tp=2)
    assert [str(layout) for layout in legal_layouts(mesh)] == [
        "(R,R,R)", "(P,P,P)", "(C,C,C)",
        "(S,R,R)", "(S,P,P)", "(S,C,C)",
        "(S,S,R)", "(S,S,P)", "(S,S,C)",
        "(S,S,S)",
    ]  # fmt: skip
    assert [str(move) for move in moves_from(mesh, owed(mesh))] == [
        "reduce_scatter over pod: (P,P,P) -> (S,P,P)",
        "reduce_scatter over pod x dp: (P,P,P) -> (S,S,P)",
        "reduce_scatter over pod x dp x tp: (P,P,P) -> (S,S,S)",
        "all_reduce over pod x dp x tp: (P,P,P) -> (R,R,R)",
    ]
    split = RowSplit.from_groups(mesh, (3, 0, 1, 2))
    assert split.counts == (2, 1, 0, 0, 1, 0, 1, 1)
    assert split.pieces(5, full(mesh), group(mesh)) == (3, 0, 1, 2)
    assert split.pieces(5, Layout.on(mesh, "SRR"), scattered(mesh)) == (1, 0, 1, 1)


@settings(max_examples=50)
@given(splits(), st.data())
def test_a_chain_of_moves_keeps_the_number_of_rows(split: RowSplit, data: st.DataObject) -> None:
    mesh = split.mesh
    layout = data.draw(st.sampled_from(legal_layouts(mesh)))
    for _ in range(6):
        moves = moves_from(mesh, layout)
        if not moves:
            assert mesh.size == 1
            break
        layout = data.draw(st.sampled_from(moves)).dst
        firsts = {mesh.group(rank, layout.num_leading, mesh.num_axes)[0] for rank in range(mesh.size)}
        assert sum(split.num_rows(layout, rank) for rank in firsts) == split.total
