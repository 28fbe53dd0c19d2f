"""The collectives of thread ranks: values to the bit, any row counts, and whose memory a result is."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.comm import Communicator
from narrows.comm.sums import sum_rows
from narrows.layout import Mesh
from narrows.ranks import run_ranks

COUNTS = [(3, 2), (0, 5), (0, 0), (1, 0), (2, 1, 3, 0), (0, 0, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0, 0, 0, 0, 0)]


def line(num: int) -> Mesh:
    return Mesh.of(dp=1, tp=num)


def rough(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of such different sizes that a float32 sum depends on its order."""
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=source) * 10 ** (6 * torch.rand(*shape, generator=source) - 3)).to(dtype)


def rank_order_sum(parts: Sequence[Tensor], counts: Sequence[int], addends: Sequence[Sequence[Tensor]]) -> Tensor:
    """The definition: float32, rank order, then the addends of the member whose piece it is, rounded once."""
    total = parts[0].float().clone()
    for part in parts[1:]:
        total = total + part.float()
    pieces = []
    for piece, joined in zip(total.split(list(counts)), addends, strict=True):
        for addend in joined:
            piece = piece + addend.float()
        pieces.append(piece)
    return torch.cat(pieces).to(parts[0].dtype)


def reduced_three_ways(
    counts: tuple[int, ...], width: int, dtype: torch.dtype, addend_dtypes: Sequence[torch.dtype]
) -> None:
    num, total = len(counts), sum(counts)
    parts = [rough(r, total, width, dtype=dtype) for r in range(num)]
    addends = [
        [rough(100 * r + i, counts[r], width, dtype=dt) for i, dt in enumerate(addend_dtypes)] for r in range(num)
    ]

    def rank(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        me, ranks = comm.rank, tuple(range(num))
        whole = comm.all_reduce(parts[me], ranks, counts, "all-reduce", addends[me])
        piece = comm.reduce_scatter(parts[me], ranks, counts, "reduce-scatter", addends[me])
        (joined,) = comm.all_gather([piece], ranks, counts, "all-gather")
        return whole, piece, joined

    want = rank_order_sum(parts, counts, addends)
    for me, (whole, piece, joined) in enumerate(run_ranks(line(num), rank, checked=True)):
        assert whole.dtype == piece.dtype == dtype
        assert whole.shape == (total, width) and piece.shape == (counts[me], width)
        assert torch.equal(whole, want) and torch.equal(joined, want)
        assert torch.equal(piece, want.split(list(counts))[me])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_sum_has_the_same_bits_by_every_way(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    reduced_three_ways(counts, 33, dtype, ())
    reduced_three_ways(counts, 33, dtype, (dtype,))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=6),
    st.integers(0, 9),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.lists(st.sampled_from([torch.bfloat16, torch.float32]), max_size=3),
)
def test_a_sum_has_the_same_bits_over_every_path_for_any_counts(
    counts: list[int], width: int, dtype: torch.dtype, addend_dtypes: list[torch.dtype]
) -> None:
    reduced_three_ways(tuple(counts), width, dtype, addend_dtypes)


def test_the_order_of_the_sum_and_the_one_rounding_are_visible_in_these_values() -> None:
    """Guards the tests above: with other orders, or a rounding before the addends, their values would differ."""
    parts = [rough(r, 8, 33, dtype=torch.bfloat16) for r in range(4)]
    addends = [[rough(100 * r, 2, 33, dtype=torch.bfloat16)] for r in range(4)]
    counts = (2, 2, 2, 2)
    want = rank_order_sum(parts, counts, addends)
    rounded_first = rank_order_sum(parts, counts, [[]] * 4) + torch.cat([a for (a,) in addends])
    assert not torch.equal(want, rounded_first)
    singles = [part.float() for part in parts]
    assert not torch.equal(rank_order_sum(singles, counts, [[]] * 4), rank_order_sum(singles[::-1], counts, [[]] * 4))


def test_one_piece_is_summed_as_the_whole_is() -> None:
    parts = [rough(r, 7, 5, dtype=torch.bfloat16) for r in range(3)]
    addends = [rough(9, 3, 5), rough(10, 3, 5, dtype=torch.bfloat16)]
    want = rank_order_sum(parts, (2, 3, 2), ((), addends, ()))
    assert torch.equal(sum_rows(parts, 2, 3, addends), want[2:5])
    single = rough(0, 2, 2)
    assert torch.equal(sum_rows([single], 0, 2), single) and sum_rows([single], 0, 2).data_ptr() != single.data_ptr()


DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("checked", [False, True])
def test_a_gather_packs_fields_of_any_width_and_dtype(counts: tuple[int, ...], checked: bool) -> None:
    num = len(counts)
    fields = [(torch.arange(sum(counts) * w).view(sum(counts), w) % 5).to(dt) for w, dt in enumerate(DTYPES)]

    def rank(comm: Communicator) -> list[Tensor]:
        mine = [field.split(list(counts))[comm.rank] for field in fields]
        return comm.all_gather(mine, tuple(range(num)), counts, "fields")

    for got in run_ranks(line(num), rank, checked=checked):
        for field, want in zip(got, fields, strict=True):
            assert field.dtype == want.dtype and field.shape == want.shape
            assert torch.equal(field.float(), want.float())


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("widths", [(3, 2), (0, 4), (0, 0), (1, 0, 2, 5)], ids=str)
def test_a_column_gather_lays_columns_side_by_side(rows: int, widths: tuple[int, ...]) -> None:
    full = rough(0, rows, sum(widths), dtype=torch.bfloat16)

    def rank(comm: Communicator) -> Tensor:
        mine = full.split(list(widths), dim=1)[comm.rank]  # not contiguous: that is ordinary
        return comm.column_gather(mine, tuple(range(len(widths))), widths, "columns")

    for got in run_ranks(line(len(widths)), rank, checked=True):
        assert torch.equal(got, full)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (0, 7), ()], ids=str)
def test_a_broadcast_delivers_the_roots_tensor(shape: tuple[int, ...]) -> None:
    values = [torch.full(shape, r + 1) for r in range(3)]

    def rank(comm: Communicator) -> Tensor:
        return comm.broadcast(values[comm.rank], (0, 1, 2), 2, "sampled ids")

    for got in run_ranks(line(3), rank, checked=True):
        assert torch.equal(got, values[2])


def test_inputs_that_are_not_contiguous_give_the_same_results() -> None:
    wide = [rough(r, 6, 20) for r in range(2)]

    def rank(comm: Communicator) -> list[Tensor]:
        out = []
        for x in (wide[comm.rank][:, 3:9], wide[comm.rank][:, 3:9].contiguous(), wide[comm.rank].T[:6, :6].T):
            out.append(comm.all_reduce(x, (0, 1), (4, 2), "sum"))
            out.append(comm.broadcast(x, (0, 1), 1, "copy"))
        return out

    for got in run_ranks(line(2), rank):
        assert torch.equal(got[0], got[2]) and torch.equal(got[1], got[3])
        assert all(x.is_contiguous() for x in got)


def test_groups_are_independent_of_each_other() -> None:
    """Communicator, tp and dp groups in turn, on a mesh whose tp groups run at different speeds."""
    mesh = Mesh.of(dp=2, tp=3)

    def rank(comm: Communicator) -> list[float]:
        tp, dp, everyone = mesh.group(comm.rank, 1, 2), mesh.group(comm.rank, 0, 1), tuple(range(6))
        x = torch.full((3, 1), float(comm.rank))
        out = []
        for i in range(20):
            if mesh.group_of(comm.rank) == i % 2:
                time.sleep(0.0005)
            out.append(comm.all_reduce(x, tp, (1, 1, 1), "tp")[0, 0].item())
            out.append(comm.all_reduce(x, dp, (3, 0), "dp")[0, 0].item())
            out.append(comm.all_reduce(x, everyone, (1, 1, 0, 0, 0, 1), "comm")[0, 0].item())
            comm.barrier(everyone, "step")
        return out

    for r, got in enumerate(run_ranks(mesh, rank, checked=True)):
        tp, dp = mesh.group(r, 1, 2), mesh.group(r, 0, 1)
        assert got == [float(sum(tp)), float(sum(dp)), 15.0] * 20


# --- whose memory


def test_results_share_no_memory() -> None:
    """Every result is overwritten by its owner; no input and no other result may change."""
    ranks, counts = (0, 1, 2), (2, 0, 1)

    def rank(comm: Communicator) -> None:
        me = comm.rank
        for dtype in (torch.float32, torch.bfloat16):
            whole, mine = torch.full((3, 2), me + 1, dtype=dtype), torch.full((counts[me], 2), me + 1, dtype=dtype)
            results = {
                "all_gather": comm.all_gather([mine, mine], ranks, counts, "g")[0],
                "reduce_scatter": comm.reduce_scatter(whole, ranks, counts, "r", [mine]),
                "all_reduce": comm.all_reduce(whole, ranks, counts, "a", [mine]),
                "column_gather": comm.column_gather(whole, ranks, (2, 2, 2), "c"),
                "broadcast": comm.broadcast(whole, ranks, 0, "b"),
            }
            expected = {name: result.clone() for name, result in results.items()}
            for name, result in results.items():
                assert torch.equal(result, expected[name]), f"a peer wrote into the result of {name}"
                result.fill_(-7 - me)
                comm.barrier(ranks, "all have written")
                assert bool((whole == me + 1).all()) and bool((mine == me + 1).all()), f"{name} aliases an input"
                assert bool((result == -7 - me).all()), f"the result of {name} is shared"
                comm.barrier(ranks, "all have looked")

    run_ranks(line(3), rank)


def test_an_input_may_be_overwritten_after_the_call() -> None:
    ranks, counts = (0, 1, 2, 3), (2, 1, 0, 3)

    def rank(comm: Communicator) -> None:
        me = comm.rank
        x, mine, column = torch.empty(6, 3), torch.empty(counts[me], 3), torch.empty(2, me)
        for i in range(60):
            if (i + me) % 4 == 0:
                time.sleep(0.0003)
            for t in (x, mine, column):
                t.fill_(i * 10 + me)
            summed = float(4 * i * 10 + 6)
            assert bool((comm.all_reduce(x, ranks, counts, "a") == summed).all())
            x.fill_(i * 10 + me)
            assert bool((comm.reduce_scatter(x, ranks, counts, "r") == summed).all())
            x.fill_(i * 10 + me)
            (rows,) = comm.all_gather([mine], ranks, counts, "g")
            mine.fill_(-1)
            assert rows[:, 0].tolist() == [i * 10 + r for r, n in enumerate(counts) for _ in range(n)]
            columns = comm.column_gather(column, ranks, (0, 1, 2, 3), "c")
            column.fill_(-1)
            assert columns[1].tolist() == [i * 10 + r for r in range(4) for _ in range(r)]
            copied = comm.broadcast(x, ranks, 3, "b")
            x.fill_(-1)
            assert bool((copied == i * 10 + 3).all())

    run_ranks(line(4), rank)


def test_a_group_of_one_rank_returns_its_input() -> None:
    def rank(comm: Communicator) -> None:
        alone = (comm.rank,)
        if comm.rank == 0:  # the other rank makes no such call
            x, more = rough(1, 4, 5, dtype=torch.bfloat16), rough(2, 4, 5, dtype=torch.bfloat16)
            assert comm.all_gather([x, more], alone, (4,), "g") == [x, more]
            assert comm.reduce_scatter(x, alone, (4,), "r") is x
            assert comm.all_reduce(x, alone, (4,), "a") is x
            assert comm.column_gather(x, alone, (5,), "c") is x
            assert comm.broadcast(x, alone, 0, "b") is x
            comm.barrier(alone, "w")
            want = ((x.float() + more.float()) + x.float()).to(torch.bfloat16)
            assert torch.equal(comm.all_reduce(x, alone, (4,), "a", [more, x]), want)
            assert torch.equal(comm.reduce_scatter(x, alone, (4,), "a", [more, x]), want)
            single = rough(3, 4, 5)
            kept = single.clone()
            comm.all_reduce(single, alone, (4,), "a", [single])
            assert torch.equal(single, kept)
            lent = comm.send_buffer(4, 5, torch.float32).fill_(3)
            result = comm.all_reduce(lent, alone, (4,), "a")
            comm.send_buffer(4, 5, torch.float32).fill_(9)
            assert bool((result == 3).all()) and result.data_ptr() != lent.data_ptr(), "it lies in a send buffer"

    run_ranks(line(2), rank)


def test_a_send_buffer_is_reused_only_after_the_collective_that_consumes_it() -> None:
    ranks, counts = (0, 1), (2, 1)

    def rank(comm: Communicator) -> None:
        rows = counts[comm.rank]
        first = comm.send_buffer(rows, 4, torch.float32).fill_(1)
        second = comm.send_buffer(rows, 4, torch.float32).fill_(2)  # e.g. hidden and residual, packed
        other = comm.send_buffer(rows, 4, torch.bfloat16).fill_(3)
        assert len({first.data_ptr(), second.data_ptr(), other.data_ptr()}) == 3
        for x in (first, second):
            assert x.shape == (rows, 4) and x.is_contiguous()
        (got,) = comm.all_gather([other], ranks, counts, "another collective in between")
        comm.send_buffer(rows, 4, torch.bfloat16).fill_(9)
        assert bool((got == 3).all())
        a, b = comm.all_gather([first, second], ranks, counts, "fields")
        lent = {first.data_ptr(), second.data_ptr()}
        again = [comm.send_buffer(rows, 4, torch.float32).fill_(8) for _ in range(2)]
        assert {x.data_ptr() for x in again} == lent
        assert bool((a == 1).all()) and bool((b == 2).all())
        assert not {a.data_ptr(), b.data_ptr()} & lent

        for size in (1, 50, 7, 0):  # grows when needed, and a smaller one is a part of it
            x = comm.send_buffer(size, 3, torch.float32).fill_(comm.rank + 1)
            assert bool((comm.all_reduce(x, ranks, (size, 0), "sum") == 3).all())
            y = comm.send_buffer(size, 3, torch.float32).fill_(comm.rank + 1)
            part = comm.reduce_scatter(y, ranks, (0, size), "sum")
            comm.send_buffer(size, 3, torch.float32).fill_(100)
            assert bool((part == 3).all())
        nothing = comm.send_buffer(5, 0, torch.int8)
        assert comm.all_reduce(nothing.float(), ranks, (5, 0), "no columns").shape == (5, 0)

    run_ranks(line(2), rank, checked=True)


def test_a_thread_communicator_implements_the_protocol() -> None:
    def rank(comm: Communicator) -> bool:
        return comm.mesh == line(2) and comm.checked

    assert run_ranks(line(2), rank, checked=True) == [True, True]
