"""Moves on tensors: every path of moves keeps the tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import paths_from
from torch import Tensor

from narrows.comm import Communicator, Geometry, Mover, assemble, scatter
from narrows.errors import LayoutError
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
    scattered,
    split_evenly,
)
from narrows.ranks import run_ranks

MESHES = [
    Mesh.of(dp=1, tp=4),
    Mesh.of(dp=4, tp=1),
    Mesh.of(dp=2, tp=2),
    Mesh.of(dp=2, tp=3),
    Mesh.of(pod=2, dp=2, tp=2),
]
WIDTH = 10


def columns_of(mesh: Mesh, layout: Layout, width: int) -> tuple[int, ...]:
    """Columns per rank under a layout with columns: split unevenly over the ranks that hold the same rows."""
    block = len(mesh.group(0, layout.num_leading, mesh.num_axes))
    return tuple(reversed(split_evenly(width, block))) * (mesh.size // block)


def value(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def assert_holds(layout: Layout, split: RowSplit, shards: Sequence[Tensor], want: Tensor) -> None:
    """Every rank holds its part of ``want``, to the bit; replicas are looked at one by one."""
    columns = columns_of(split.mesh, layout, want.shape[1])
    assert torch.equal(assemble(layout, split, shards, columns), want)
    if not layout.owes_sum:
        for shard, expected in zip(shards, scatter(layout, split, want, columns), strict=True):
            assert torch.equal(shard, expected)


def follow(comm: Communicator, path: Sequence[Move], split: RowSplit, x: Tensor, columns: tuple[int, ...]) -> Tensor:
    for i, move in enumerate(path):
        mover = Mover(comm, move, f"{i}: {move}", columns)
        (x,) = mover([x], mover.geometry(split))
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_legal_pair_of_layouts_is_connected_and_keeps_the_tensor(mesh: Mesh, dtype: torch.dtype) -> None:
    paths = {(src, dst): path for src in legal_layouts(mesh) for dst, path in paths_from(mesh, src).items()}
    splits = [
        RowSplit(mesh, split_evenly(2 * mesh.size + 1, mesh.size)),
        RowSplit(mesh, tuple(3 * (rank % 2) + rank % 3 for rank in range(mesh.size))),
        RowSplit.from_groups(mesh, (5, *(0,) * (mesh.num_groups - 1))),
        RowSplit.from_groups(mesh, (*(0,) * (mesh.num_groups - 1), 1)),
        RowSplit(mesh, (0,) * mesh.size),
    ]
    cases = [(split, src, dst) for split in splits for src, dst in paths]
    wants = {split: value(split.total, WIDTH, dtype) for split in splits}
    columns = {src: columns_of(mesh, src, WIDTH) for src in legal_layouts(mesh)}
    starts = [scatter(src, split, wants[split], columns[src]) for split, src, _ in cases]

    def rank(comm: Communicator) -> list[Tensor]:
        return [
            follow(comm, paths[src, dst], split, shards[comm.rank], columns[src])
            for (split, src, dst), shards in zip(cases, starts, strict=True)
        ]

    ends = run_ranks(mesh, rank, checked=True)
    for i, (split, _, dst) in enumerate(cases):
        assert_holds(dst, split, [end[i] for end in ends], wants[split])


@st.composite
def chains(draw: st.DrawFn) -> tuple[RowSplit, int, Layout, list[Move]]:
    mesh = draw(st.sampled_from(MESHES))
    split = RowSplit(mesh, tuple(draw(st.lists(st.integers(0, 5), min_size=mesh.size, max_size=mesh.size))))
    src = layout = draw(st.sampled_from(legal_layouts(mesh)))
    path: list[Move] = []
    for _ in range(draw(st.integers(1, 8))):
        path.append(draw(st.sampled_from(moves_from(mesh, layout))))
        layout = path[-1].dst
    return split, draw(st.integers(0, 9)), src, path


@settings(max_examples=60, deadline=None)
@given(chains())
def test_any_chain_of_moves_over_any_split_keeps_the_tensor(case: tuple[RowSplit, int, Layout, list[Move]]) -> None:
    split, width, src, path = case
    want = value(split.total, width, torch.bfloat16)
    columns = columns_of(split.mesh, src, width)
    shards = scatter(src, split, want, columns)
    ends = run_ranks(split.mesh, lambda comm: follow(comm, path, split, shards[comm.rank], columns), checked=True)
    assert_holds(path[-1].dst, split, ends, want)


def move(mesh: Mesh, src: Layout, dst: Layout) -> Move:
    (found,) = [m for m in moves_from(mesh, src) if m.dst == dst]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_an_addend_joins_an_owed_sum_once(mesh: Mesh, dtype: torch.dtype) -> None:
    """The residual, scattered where the sum is owed, joins it: float32, one rounding, by either collective."""
    split = RowSplit(mesh, tuple((rank * 2 + 1) % 4 for rank in range(mesh.size)))
    hidden = value(split.total, WIDTH, dtype)
    residual = value(split.total, WIDTH, torch.float32).flip(1) * 3
    want = (hidden.float() + residual).to(dtype)
    sources = [src for src in legal_layouts(mesh) if src.owes_sum]
    shards = {src: scatter(src, split, hidden) for src in sources}
    joined = scatter(scattered(mesh), split, residual)
    cases = [
        move(mesh, src, dst)
        for src in sources
        for dst in (scattered(mesh), Layout.on(mesh, src.placements.replace("P", "R").replace("-", "R")))
        if dst != src
    ]
    assert {case.kind for case in cases} == {MoveKind.ALL_REDUCE, MoveKind.REDUCE_SCATTER}

    def rank(comm: Communicator) -> list[Tensor]:
        out = []
        for case in cases:
            mover = Mover(comm, case, str(case))
            geometry = mover.geometry(split)
            assert geometry.stop - geometry.start == joined[comm.rank].shape[0]
            out += mover([shards[case.src][comm.rank]], geometry, [joined[comm.rank]])
        return out

    ends = run_ranks(mesh, rank, checked=True)
    for i, case in enumerate(cases):
        assert_holds(case.dst, split, [end[i] for end in ends], want)


def test_gathers_and_slices_carry_several_fields() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    split = RowSplit(mesh, (3, 0, 2, 2))
    there, back = move(mesh, scattered(mesh), full(mesh)), move(mesh, full(mesh), scattered(mesh))
    fields = [value(7, 6, torch.bfloat16), torch.arange(14).view(7, 2), value(7, 0, torch.float32)]
    shards = [scatter(scattered(mesh), split, field) for field in fields]

    def rank(comm: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        gather, cut = Mover(comm, there, "gather"), Mover(comm, back, "slice")
        whole = gather([shard[comm.rank] for shard in shards], gather.geometry(split))
        return whole, cut(whole, cut.geometry(split))

    for r, (whole, own) in enumerate(run_ranks(mesh, rank, checked=True)):
        for f, field in enumerate(fields):
            assert torch.equal(whole[f], field) and torch.equal(own[f], shards[f][r])
            assert own[f].numel() == 0 or own[f].untyped_storage().data_ptr() == whole[f].untyped_storage().data_ptr()


def test_the_geometry_is_plain_numbers_from_this_rank_s_side() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    split = RowSplit(mesh, (3, 2, 0, 4))
    cases = {
        (full(mesh), scattered(mesh)): ((3, 2, 0, 4), [(0, 3), (3, 5), (5, 5), (5, 9)]),
        (scattered(mesh), full(mesh)): ((3, 2, 0, 4), [(0, 3), (3, 5), (5, 5), (5, 9)]),
        (owed(mesh), full(mesh)): ((3, 2, 0, 4), [(0, 3), (3, 5), (5, 5), (5, 9)]),
        (full(mesh), group(mesh)): ((5, 4), [(0, 5), (0, 5), (5, 9), (5, 9)]),
        (group(mesh), full(mesh)): ((5, 4), [(0, 5), (0, 5), (5, 9), (5, 9)]),
        (owed(mesh), owed(mesh, 1)): ((5, 4), [(0, 5), (0, 5), (5, 9), (5, 9)]),
    }

    def rank(comm: Communicator) -> list[Geometry]:
        return [Mover(comm, move(mesh, *ends), "x").geometry(split) for ends in cases]

    for r, geometries in enumerate(run_ranks(mesh, rank)):
        for geometry, (pieces, spans) in zip(geometries, cases.values(), strict=True):
            assert geometry == (pieces, *spans[r])

    def within_groups(comm: Communicator) -> tuple[Geometry, Geometry, Geometry]:
        ends = [
            (owed(mesh, 1), group(mesh)),
            (group(mesh), scattered(mesh)),
            (Layout.on(mesh, "SC"), group(mesh)),
        ]
        a, b, c = (Mover(comm, move(mesh, *pair), "x", (1, 2, 3, 4)).geometry(split) for pair in ends)
        return a, b, c

    assert run_ranks(mesh, within_groups) == [
        (((3, 2), 0, 3), ((3, 2), 0, 3), ((5,), 0, 5)),
        (((3, 2), 3, 5), ((3, 2), 3, 5), ((5,), 0, 5)),
        (((0, 4), 0, 0), ((0, 4), 0, 0), ((4,), 0, 4)),
        (((0, 4), 0, 4), ((0, 4), 0, 4), ((4,), 0, 4)),
    ]


def test_a_mover_refuses_unsupported_moves() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    split = RowSplit(mesh, (1, 1, 1, 1))
    columns_move = move(mesh, Layout.on(mesh, "CC"), full(mesh))

    def rank(comm: Communicator) -> None:
        with pytest.raises(LayoutError, match=r"dp 4 x tp 1.*dp 2 x tp 2"):
            other = Mesh.of(dp=4, tp=1)
            Mover(comm, move(other, full(other), scattered(other)), "x")
        for columns in (None, (1, 2)):
            with pytest.raises(LayoutError, match="columns of each of 4 ranks"):
                Mover(comm, columns_move, "x", columns)
        x = torch.ones(4, 3)
        cut = Mover(comm, move(mesh, full(mesh), scattered(mesh)), "cut")
        with pytest.raises(AssertionError, match="addend"):
            cut([x], cut.geometry(split), [x[:1]])
        reduce = Mover(comm, move(mesh, owed(mesh), full(mesh)), "sum")
        with pytest.raises(ValueError, match="unpack"):
            reduce([x, x], reduce.geometry(split))

    run_ranks(mesh, rank)


# --- assemble and scatter


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*MESHES, Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=2), Mesh.of(dp=3, tp=3)]),
    st.data(),
    st.integers(0, 9),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
def test_assemble_undoes_scatter(mesh: Mesh, data: st.DataObject, width: int, dtype: torch.dtype) -> None:
    split = RowSplit(mesh, tuple(data.draw(st.lists(st.integers(0, 5), min_size=mesh.size, max_size=mesh.size))))
    want = value(split.total, width, dtype)
    for layout in legal_layouts(mesh):
        for columns in (None, columns_of(mesh, layout, width)):
            shards = scatter(layout, split, want, columns)
            assert [shard.shape[0] for shard in shards] == [split.num_rows(layout, r) for r in range(mesh.size)]
            got = assemble(layout, split, shards, columns)
            assert got.dtype == dtype and torch.equal(got, want)
            if layout.owes_sum:  # an addend cannot be mistaken for the value
                for r, shard in enumerate(shards):
                    start, stop = split.span(layout, r)
                    assert not bool(((shard == want[start:stop]) & (want[start:stop] != 0)).any())


def test_an_owed_sum_survives_every_grouping_of_its_addends() -> None:
    mesh = Mesh.of(dp=2, tp=3)
    want = value(5, WIDTH, torch.bfloat16)
    shards = scatter(owed(mesh), RowSplit(mesh, (5, 0, 0, 0, 0, 0)), want)
    for order in itertools.islice(itertools.permutations(shards), 0, None, 7):
        a, b, c, d, e, f = order
        assert torch.equal((a + b) + ((c + d) + (e + f)), want)


def test_tensors_that_do_not_fit_the_layout_are_refused_by_rank() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    split = RowSplit(mesh, (2, 1, 0, 3))
    shards = scatter(group(mesh), split, torch.ones(6, 4))
    with pytest.raises(LayoutError, match=r"rank 2 holds 2 rows, but \(S,R\).* says 3"):
        assemble(group(mesh), split, [*shards[:2], shards[2][:2], shards[3]])
    with pytest.raises(LayoutError, match="4 ranks, but there are 3"):
        assemble(group(mesh), split, shards[:3])
    with pytest.raises(LayoutError, match="7 rows, but the split says 6"):
        scatter(full(mesh), split, torch.ones(7, 4))
    columns = Layout.on(mesh, "SC")
    with pytest.raises(LayoutError, match=r"ranks \(0, 1\) hold \(1, 2\) columns, but the tensor has 4"):
        scatter(columns, split, torch.ones(6, 4), (1, 2, 1, 3))
    cut = scatter(columns, split, torch.ones(6, 4), (1, 3, 2, 2))
    with pytest.raises(LayoutError, match="rank 0 holds 1 columns, but its share of them is 3"):
        assemble(columns, split, cut, (3, 1, 2, 2))
