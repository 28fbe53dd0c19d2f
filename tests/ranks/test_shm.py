"""Collectives through shared memory: bit for bit those of rank threads at all sizes; and their faults.

The ranks are threads here, each with a segment of its own, which a process may map as often as it likes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import ranks_lab as lab
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S
from torch import Tensor
from torch.distributed import HashStore
from transports_lab import run_over

from narrows.comm import Communicator
from narrows.comm.segment import Segment
from narrows.comm.shm_calls import functions
from narrows.comm.shm_peers import share
from narrows.comm.shm_transport import ShmTransport
from narrows.comm.sums import sum_rows
from narrows.comm.transport import RowNorm
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh
from narrows.native import why_absent
from narrows.ops.compiled import kernels
from narrows.ops.rms_norm import add_rms_norm, rms_norm
from narrows.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(functions() is None, reason=f"no compiled code: {why_absent()}"),
]

FLOATS = (torch.bfloat16, torch.float32, torch.float16)
Rank = Callable[[Any], Any]


def line(num: int) -> Mesh:
    return Mesh.of(dp=1, tp=num)


def run_shared(mesh: Mesh, fn: Rank, *, checked: bool = False) -> list[Any]:
    return run_over("shared memory", mesh, fn, checked=checked)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(bits(got), bits(want))


# --- values


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=2, max_size=4),
    st.sampled_from([1, 16, 33, 512]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([(), (torch.bfloat16,), (torch.float32, torch.bfloat16)]),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.skipif(kernels() is None, reason="the norms are not compiled for this CPU")
def test_the_fused_sum_and_norm_equals_both_ops_bit_for_bit(
    counts: list[int], width: int, dtype: torch.dtype, kinds: Sequence[torch.dtype], apart: bool, checked: bool
) -> None:
    ranks, total, eps = tuple(range(len(counts))), sum(counts), 1e-5
    weight = lab.rough(99, 1, width, dtype=dtype)[0]
    residual = lab.rough(98, total, width, dtype=dtype) if apart else None

    def rank(comm: Communicator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        me = ranks.index(comm.rank)
        x = lab.rough(me, total, width, dtype=dtype)
        addends = [lab.rough(7 + me, counts[me], width, dtype=kind) for kind in kinds]
        done = comm.all_reduce_norm(x, ranks, counts, "both", addends, RowNorm(weight, eps, residual))
        assert done is not None
        summed = comm.all_reduce(x, ranks, counts, "the sum", addends)
        if residual is None:
            return (*done, rms_norm(summed, weight, eps), summed)
        return (*done, *add_rms_norm(summed, residual, weight, eps))

    for normed, summed, want_normed, want_summed in run_shared(line(len(counts)), rank, checked=checked):
        assert_same(normed, want_normed)
        assert_same(summed, want_summed)


def test_a_fused_call_that_is_too_large_runs_as_two() -> None:
    def rank(comm: Communicator) -> object:
        x, norm = torch.ones(2, 9000), RowNorm(torch.ones(9000), 1e-6, None)
        one = comm.all_reduce_norm(x[:, :8], (0,), (2,), "alone", (), RowNorm(torch.ones(8), 1e-6, None))
        half = RowNorm(torch.ones(8, dtype=torch.float16), 1e-6, None)
        other = comm.all_reduce_norm(x[:, :8].half(), (0, 1), (1, 1), "of a dtype without norms", (), half)
        return comm.all_reduce_norm(x, (0, 1), (1, 1), "too large", (), norm), one, other

    assert run_shared(line(2), rank) == [(None, None, None)] * 2
    assert run_ranks(line(2), rank) == [(None, None, None)] * 2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 5, 90]), min_size=2, max_size=3),
    st.sampled_from([3, 64, 200]),
    st.sampled_from(FLOATS),
    st.lists(st.sampled_from(FLOATS), max_size=3) | st.just([torch.bfloat16] * 17),  # more than the compiled code takes
)
def test_addends_of_any_dtype_join_a_sum(
    counts: list[int], width: int, dtype: torch.dtype, kinds: list[torch.dtype]
) -> None:
    num, total = len(counts), sum(counts)

    def small(seed: int, rows: int, kind: torch.dtype) -> Tensor:
        return lab.rough(seed, rows, width).clamp(-400, 400).to(kind)

    def rank(comm: Communicator) -> tuple[Tensor, Tensor]:
        me, ranks = comm.rank, tuple(range(num))
        x, joined = small(me, total, dtype), [small(9 * me + i, counts[me], kind) for i, kind in enumerate(kinds)]
        return comm.all_reduce(x, ranks, counts, "a", joined), comm.reduce_scatter(x, ranks, counts, "r", joined)

    for got, want in zip(run_shared(line(num), rank), run_ranks(line(num), rank), strict=True):
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_round_as_torch_including_special_values(dtype: torch.dtype) -> None:
    """Denormals, ties, zeros of both signs, infinities and overflow; in blocks and in the remainder."""
    odd = [0.0, -0.0, 1e-39, -3e-40, 1e-45, 1.00390625, 1.01171875, 3.4e38, -3.4e38, float("inf"), 6e-8, 65504.0, 1e-30]
    x = torch.tensor(odd * 31).to(dtype)
    parts = [x.view(1, -1), x.roll(5).view(1, -1), x.roll(2).view(1, -1)]
    want = sum_rows(parts, 0, 1)
    (got, *_) = run_shared(line(3), lambda comm: comm.all_reduce(parts[comm.rank], (0, 1, 2), (0, 1, 0), "a"))
    is_number = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan()) and int(is_number.sum()) > 300
    assert torch.equal(got[is_number].view(torch.uint8), want[is_number].view(torch.uint8))


def test_many_fields_travel_in_several_exchanges() -> None:
    def rank(comm: Communicator) -> list[Tensor]:
        return comm.all_gather([torch.full((2, i), comm.rank * 100 + i) for i in range(40)], (0, 1), (2, 2), "many")

    for got in run_shared(line(2), rank, checked=True):
        assert [x.tolist() for x in got] == [[[i] * i] * 2 + [[100 + i] * i] * 2 for i in range(40)]


# --- whose memory


def test_a_large_result_stays_valid_while_it_is_referenced() -> None:
    """Blocks of results are reused only when no result and no view of one is referenced."""

    def rank(comm: Communicator) -> int:
        kept, addresses = [], set()
        for i in range(30):
            mine = torch.full((600, 256), float(10 * i + comm.rank))
            (whole,) = comm.all_gather([mine], (0, 1), (600, 600), "g")
            addresses.add(whole.data_ptr())
            if i % 10 == 0:
                kept.append((i, whole[600:, 3]))
            del whole
        for i, column in kept:
            assert bool((column == 10 * i + 1).all())
        return len(addresses)

    assert max(run_shared(line(2), rank)) <= 3 + 2


def test_a_large_result_may_be_passed_on_and_then_overwritten() -> None:
    """It is read in place, so the call waits until every rank has read it, however slow."""
    counts = (900, 900, 900)

    def rank(comm: Communicator) -> None:
        for i in range(20):
            x = torch.full((2700, 128), float(i + comm.rank))
            piece = comm.reduce_scatter(x, (0, 1, 2), counts, "r")
            assert isinstance(comm._buffers, Segment)
            assert comm._buffers.holds(piece.data_ptr()), "it would be copied"
            if (i + comm.rank) % 3 == 0:
                time.sleep(0.002)
            (whole,) = comm.all_gather([piece], (0, 1, 2), counts, "g")
            piece.fill_(-1)
            assert bool((whole == 3 * i + 3).all())
            summed = comm.all_reduce(whole, (0, 1, 2), counts, "a")
            whole.fill_(-1)
            assert bool((summed == 9 * i + 9).all())

    run_shared(line(3), rank)


@pytest.mark.parametrize("size", [1, 700])
def test_inputs_may_be_overwritten_and_results_share_no_memory(size: int) -> None:
    run_shared(line(4), lambda comm: lab.inputs_may_be_written_again(comm, 30, size))
    run_shared(line(4), lab.results_are_nobody_elses)
    run_shared(line(4), lab.send_buffers)


# --- what differs


@pytest.mark.parametrize(
    "other",
    [
        lambda comm: comm.barrier((0, 1, 2), "x"),
        lambda comm: comm.all_reduce(torch.ones(6, 5), (0, 1, 2), (1, 2, 3), "x"),
        lambda comm: comm.all_reduce(torch.ones(6, 4).bfloat16(), (0, 1, 2), (1, 2, 3), "x"),
        lambda comm: comm.all_reduce(torch.ones(6, 4), (0, 1, 2), (2, 2, 2), "x"),
        lambda comm: comm.reduce_scatter(torch.ones(6, 4), (0, 1, 2), (1, 2, 3), "x"),
        lambda comm: comm.all_reduce(torch.ones(6, 4), (0, 1, 2), (1, 2, 3), "x", [torch.ones(2, 4)]),
    ],
)
def test_a_call_of_another_shape_is_refused_by_all_ranks_unchecked(other: Rank) -> None:
    """Nothing is read; ranks that catch the error can continue."""

    def rank(comm: Communicator) -> float:
        with pytest.raises(CollectiveMismatchError, match=f'rank {comm.rank} came to #0 .* "x", another of ranks 0'):
            if comm.rank == 1:
                other(comm)
            else:
                comm.all_reduce(torch.ones(6, 4), (0, 1, 2), (1, 2, 3), "x")
        return lab.sum_of(comm, 1.0)

    assert run_shared(line(3), rank) == [6.0] * 3


def test_an_all_reduce_never_matches_a_reduce_scatter() -> None:
    """Above 32 KiB an all-reduce begins as a reduce-scatter does; its gather must not match another."""
    counts, x = (32, 32), torch.ones(64, 512)

    def rank(comm: Communicator) -> float:
        with pytest.raises(CollectiveMismatchError, match=f"rank {comm.rank} came to #0"):
            if comm.rank == 1:
                comm.reduce_scatter(x, (0, 1), counts, "x")
                comm.all_gather([x[:32]], (0, 1), counts, "y")
            else:
                comm.all_reduce(x, (0, 1), counts, "x")
        return lab.sum_of(comm, 1.0)

    assert run_shared(line(2), rank) == [3.0] * 2


def test_a_tensor_that_contradicts_the_counts_is_refused_before_the_exchange() -> None:
    def rank(comm: Communicator) -> None:
        for bad in (torch.ones(5, 4), torch.ones(7, 4)):
            with pytest.raises(CollectiveMismatchError, match="does not fit"):
                comm.all_reduce(bad, (0, 1), (3, 3), "a")
        with pytest.raises(CollectiveMismatchError, match="does not fit"):
            comm.reduce_scatter(torch.ones(6, 4), (0, 1), (3, 3), "a", [torch.ones(2, 4)])
        assert lab.sum_of(comm, 1.0) == 3.0

    run_shared(line(2), rank)


# --- waiting


def test_eight_ranks_on_few_cores_make_progress() -> None:
    def rank(comm: Communicator) -> float:
        return sum(lab.sum_of(comm, float(i)) for i in range(200))

    assert run_shared(line(8), rank) == [sum(8.0 * i + 28 for i in range(200))] * 8


def test_a_long_wait_uses_no_processor_time() -> None:
    def rank(comm: Communicator) -> float:
        comm.barrier((0, 1), "start")
        if comm.rank == 1:
            time.sleep(1.0)
        before = time.thread_time()
        comm.barrier((0, 1), "end")
        return time.thread_time() - before

    assert run_shared(line(2), rank)[0] < 0.1


def test_groups_are_independent_of_each_other() -> None:
    mesh = Mesh.of(dp=2, tp=2)

    def rank(comm: Communicator) -> list[float]:
        out = []
        for i in range(30):
            for ranks in lab.groups_of(mesh, comm.rank):
                if i % 2 and comm.rank < 2:
                    time.sleep(0.0003)
                x = comm.send_buffer(600, 4, torch.float32).fill_(comm.rank + i)
                counts = (600, *(0,) * (len(ranks) - 1))
                out.append(comm.all_reduce(x, ranks, counts, "sum")[599, 3].item() - len(ranks) * i - sum(ranks))
        return out

    assert run_shared(mesh, rank) == [[0.0] * 90] * 4


# --- who shares


def test_ranks_that_cannot_open_each_others_memory_do_not_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another host: all members of a group decide alike, and say why."""
    opened = monkeypatch.setattr

    def found(ranks: Sequence[int]) -> list[Any]:
        store, out = HashStore(), [None] * 3
        threads = [threading.Thread(target=lambda r=r: out.__setitem__(r, share(store, r, 3, 0))) for r in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        return out

    together = [peers for peers, _ in found(range(3))]
    assert all(rank.share((0, 1, 2)) and rank.share((0, 2)) for rank in together)
    assert ShmTransport(together[0], (0, 2), 0).size == 2
    opened("narrows.comm.shm_peers._opened", lambda address: None)
    apart = [peers for peers, _ in found(range(3))]
    assert not any(rank.share(ranks) for rank in apart for ranks in ((0, 1, 2), (0, 2)))
    opened("narrows.comm.shm_peers.functions", lambda: None)
    opened("narrows.comm.shm_peers.no_shared_memory", lambda: "no compiled code: not built")
    assert all(peers is None and why.startswith("no compiled code") for peers, why in found(range(3)))
