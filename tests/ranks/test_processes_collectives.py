"""The collectives of rank processes: bit for bit those of rank threads, and whose memory a result is.

All of it through shared memory, as ranks of one host do, and through gloo, as they do without compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranks_lab as lab
import torch
from patience import PATIENCE_S

from narrows.comm import Communicator
from narrows.comm.buffers import Buffers
from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.native import why_absent
from narrows.ranks import ProcessRanks, ThreadRanks

POOLS = [(1, 2, "shared memory"), (2, 2, "shared memory"), (1, 3, "shared memory"), (2, 2, "gloo")]
VARIANTS = [(2, 1, "shared memory"), (1, 2, "gloo")]
COUNTS = [(3, 2, 1, 2), (0, 5, 0, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0)]


@pytest.fixture(
    scope="module",
    params=[*POOLS, *(pytest.param(pool, marks=pytest.mark.full) for pool in VARIANTS)],
    ids=lambda case: f"dp{case[0]}-tp{case[1]}-{case[2].split()[0]}",
)
def pool(request: pytest.FixtureRequest) -> Iterator[ProcessRanks[lab.Lab]]:
    dp, tp, way = request.param
    mesh = Mesh.of(dp=dp, tp=tp)
    if way == "shared memory" and why_absent():
        pytest.skip(f"no compiled code: {why_absent()}")
    with pytest.MonkeyPatch.context() as patch:
        if way == "gloo":  # either switch makes it so; the ranks inherit them
            patch.setenv("NARROWS_SHM" if mesh.size == 4 else "NARROWS_NATIVE", "0")
        ranks = ProcessRanks(mesh, lab.Lab, checked=(dp, tp) != (1, 2), once=(lab.Big,))
    with ranks:
        assert ranks.transport.startswith(way)
        yield ranks


def same_as_threads(
    pool: ProcessRanks[lab.Lab], mesh: Mesh, counts: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    with ThreadRanks(mesh, lab.Lab, checked=True) as threads:
        wanted = threads.submit(lab.Lab.run, lab.collectives, counts, width, dtype).result(PATIENCE_S)
    got = pool.submit(lab.Lab.run, lab.collectives, counts, width, dtype).result(PATIENCE_S)
    for rank, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            here = mine[name]
            assert (here.dtype, here.shape) == (value.dtype, value.shape), (rank, name)
            assert here.is_contiguous(), (rank, name)
            bits = [x.contiguous().view(-1).view(torch.uint8) for x in (here, value)]
            assert torch.equal(*bits), (rank, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_collective_has_the_bits_of_threads(pool, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    for width in (33, 0):
        same_as_threads(pool, pool.mesh, counts, width, dtype)


def test_large_tensors_have_the_bits_of_threads(pool) -> None:
    """Larger than one transfer."""
    same_as_threads(pool, pool.mesh, (300, 0, 257, 31), 64, torch.bfloat16)


def test_results_share_no_memory(pool) -> None:
    pool.submit(lab.Lab.run, lab.results_are_nobody_elses).result(PATIENCE_S)


@pytest.mark.parametrize(("rounds", "size"), [(30, 1), (30, 600), (4, 60_000)])
def test_an_input_may_be_overwritten_after_the_call(pool, rounds: int, size: int) -> None:
    pool.submit(lab.Lab.run, lab.inputs_may_be_written_again, rounds, size).result(PATIENCE_S)


def test_send_buffers_are_free_again_after_their_collective(pool) -> None:
    pool.submit(lab.Lab.run, lab.send_buffers).result(PATIENCE_S)


def test_a_group_of_one_rank_exchanges_nothing(pool) -> None:
    pool.submit(lab.Lab.run, lab.groups_of_one).result(PATIENCE_S)


def test_a_rank_is_a_process_of_one_torch_thread(pool) -> None:
    said = pool.submit(lab.Lab.run, lab.facts).result(PATIENCE_S)
    assert said == [(r, pid, 1, True, True, True, "narrows forks") for r, pid in enumerate(pool.pids)]


# --- calls


def test_calls_are_done_in_the_order_they_were_made_without_waiting(pool) -> None:
    size = len(pool.pids)
    told = pool.submit(lab.Lab.all_told).result(PATIENCE_S)[0]
    futures = [pool.submit(lab.Lab.tell, i, 0.001) for i in range(10)]
    assert pool.submit(lab.Lab.all_told).result(PATIENCE_S) == [told + list(range(10))] * size
    assert [future.result(0) for future in futures] == [[r * 100 + i for r in range(size)] for i in range(10)]


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[lab.Big]:
    """The large objects that this process pickles, in turn."""
    packed: list[lab.Big] = []
    monkeypatch.setattr(lab.Big, "__getstate__", lambda self: packed.append(self) or object.__getstate__(self))
    return packed


def test_a_shared_object_is_sent_once(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = len(pool.submit(lab.Lab.all_told).result(PATIENCE_S)[0])
    big, other = lab.Big(tuple(range(100_000))), lab.Big((1,))
    packed = count_packed(monkeypatch)
    first = pool.submit(lab.Lab.keep, big, "a").result(PATIENCE_S)
    again = [pool.submit(lab.Lab.keep, big, "b") for _ in range(5)][-1].result(PATIENCE_S)
    assert packed == [big]
    last = pool.submit(lab.Lab.keep, other, "c").result(PATIENCE_S)
    before = first[0][0] - 1
    assert again == [(before + 1, told + 6)] * len(pool.pids), "it came as several objects"
    assert last == [(before + 2, told + 7)] * len(pool.pids)
    assert pool.submit(lab.Lab.all_told).result(PATIENCE_S)[0][-6:] == [big] * 5 + [other]


def test_an_unpicklable_argument_is_refused_before_any_call(pool) -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        pool.submit(lab.Lab.run, lambda comm: 1)
    assert pool.submit(lab.Lab.run, lab.sum_of, 0.0).result(PATIENCE_S)[0] == sum(range(len(pool.pids)))


@pytest.mark.full
def test_one_row_on_eight_ranks() -> None:
    mesh = Mesh.of(dp=2, tp=4)
    with ProcessRanks(mesh, lab.Lab, checked=True) as ranks:
        same_as_threads(ranks, mesh, (0, 0, 0, 1, 0, 0, 0, 0), 5, torch.bfloat16)


def test_a_communicator_knows_only_groups_of_its_mesh() -> None:
    comm = Communicator(Mesh.of(dp=2, tp=2), 0, {}, checked=False, buffers=Buffers(), device=torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"\(0, 3\) is no group of rank 0"):
        comm.barrier((0, 3), "x")


def test_closed_ranks_refuse_calls_and_close_may_be_repeated() -> None:
    ranks = ProcessRanks(Mesh.of(dp=1, tp=1), lab.Lab)
    assert ranks.submit(lab.Lab.run, lab.sum_of, 2.0).result(PATIENCE_S) == [2.0]
    running, queued = ranks.submit(lab.Lab.tell, 1, 0.0), ranks.submit(lab.Lab.run, lab.late, 0, 3600.0)
    assert running.result(PATIENCE_S) == [1]
    ranks.close()
    ranks.close()
    for future in (queued, ranks.submit(lab.Lab.tell, 2)):
        with pytest.raises(RankError, match="closed"):
            future.result(0)
