"""Faults between ranks end within seconds with an error that names ranks and labels. Nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor

from narrows.comm import Communicator
from narrows.comm.rendezvous import SharedState
from narrows.errors import CollectiveMismatchError, RankError
from narrows.layout import Mesh
from narrows.ranks import ThreadRanks, run_ranks

FOUR = Mesh.of(dp=2, tp=2)
ALL = (0, 1, 2, 3)
SPLIT = (2, 1, 0, 2)


def rank_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("narrows rank")]


def errors_of(
    mesh: Mesh, fn: Callable[[Communicator], object], *, checked: bool = True, timeout_s: float = PATIENCE_S
) -> tuple[BaseException, dict[int, BaseException]]:
    """The error of run_ranks, and the error of each rank."""
    raised: dict[int, BaseException] = {}

    def rank(comm: Communicator) -> None:
        try:
            fn(comm)
        except BaseException as error:
            raised[comm.rank] = error
            raise

    with pytest.raises(Exception) as told:
        run_ranks(mesh, rank, checked=checked, timeout_s=timeout_s)
    assert not rank_threads()
    return told.value, raised


# --- a rank that raises


@pytest.mark.parametrize("checked", [False, True])
def test_the_first_error_ends_every_rank_and_is_raised_itself(checked: bool) -> None:
    original = ValueError("no such expert: 300")

    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "start")
        if comm.rank == 1:
            time.sleep(0.05)
            raise original
        for _ in range(3):  # 0 waits in a tp group, 2 and 3 are in another and then wait for all ranks
            comm.all_reduce(torch.ones(2, 1), FOUR.group(comm.rank, 1, 2), (1, 1), "tp sum")
            comm.barrier(ALL, "step")

    error, raised = errors_of(FOUR, rank, checked=checked)
    assert error is original
    assert any("rank 1" in note for note in error.__notes__)
    for r in (0, 2, 3):
        assert type(raised[r]) is RankError
        assert "rank 1" in str(raised[r]) and "ValueError: no such expert: 300" in str(raised[r])
        assert raised[r].__cause__ is original


def test_an_early_error_of_one_rank_ends_the_others() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 3:
            raise KeyError("gone")
        time.sleep(0.05)
        comm.barrier(ALL, "late")

    error, raised = errors_of(FOUR, rank)
    assert raised.pop(3) is error and isinstance(error, KeyError)
    assert all(type(other) is RankError for other in raised.values())  # a rank not yet begun does not begin


def test_only_the_first_of_several_errors_counts() -> None:
    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "start")
        time.sleep(0.1 * comm.rank)
        raise ValueError(f"rank {comm.rank} is wrong")

    error, _ = errors_of(FOUR, rank)
    assert str(error) == "rank 0 is wrong"


def test_a_communicator_stays_failed_after_its_error_is_caught() -> None:
    def rank(comm: Communicator) -> str:
        comm.barrier(ALL, "start")
        if comm.rank == 0:
            raise ValueError("first")
        for _ in range(2):
            with pytest.raises(RankError, match="rank 0 failed first"):
                comm.barrier(ALL, "again")
        return "ended by itself"

    error, raised = errors_of(FOUR, rank)
    assert str(error) == "first" and list(raised) == [0]


# --- ranks in different collectives


def say_label(comm: Communicator) -> None:
    label = "layer 3 post_attn_norm" if comm.rank == 2 else "layer 3 input_norm"
    comm.all_reduce(torch.ones(5, 64), ALL, SPLIT, label)


def say_op(comm: Communicator) -> None:
    if comm.rank == 2:
        comm.barrier(ALL, "layer 3 input_norm")
    else:
        comm.all_reduce(torch.ones(5, 64), ALL, SPLIT, "layer 3 input_norm")


def say_width(comm: Communicator) -> None:
    comm.all_reduce(torch.ones(5, 128 if comm.rank == 2 else 64), ALL, SPLIT, "layer 3 input_norm")


def say_dtype(comm: Communicator) -> None:
    x = torch.ones(5, 64, dtype=torch.bfloat16 if comm.rank == 2 else torch.float32)
    comm.reduce_scatter(x, ALL, SPLIT, "layer 3 input_norm")


def say_counts(comm: Communicator) -> None:
    split = (1, 2, 0, 2) if comm.rank == 2 else SPLIT
    comm.all_gather([torch.ones(SPLIT[comm.rank], 64)], ALL, split, "layer 3 input_norm")


def say_fields(comm: Communicator) -> None:
    rows = SPLIT[comm.rank]
    xs = [torch.ones(rows, 64), torch.ones(rows, 8, dtype=torch.int32)]
    comm.all_gather(xs[: 1 if comm.rank == 2 else 2], ALL, SPLIT, "layer 3 input_norm")


def say_rows_of_columns(comm: Communicator) -> None:
    comm.column_gather(torch.ones(4 if comm.rank == 2 else 5, 2), ALL, (2, 2, 2, 2), "layer 3 input_norm")


def say_root(comm: Communicator) -> None:
    comm.broadcast(torch.ones(5), ALL, 1 if comm.rank == 2 else 0, "layer 3 input_norm")


def say_number(comm: Communicator) -> None:
    comm.barrier(ALL, "start")
    if comm.rank == 2:  # begins an impossible collective, and continues regardless
        with pytest.raises(CollectiveMismatchError):
            comm.all_reduce(torch.ones(4, 64), ALL, SPLIT, "layer 3 input_norm")
    comm.all_reduce(torch.ones(5, 64), ALL, SPLIT, "layer 3 input_norm")


@pytest.mark.parametrize(
    ("fn", "odd", "others"),
    [
        (
            say_label,
            '#0 all_reduce "layer 3 post_attn_norm" [5 x 64 float32] split 2+1+0+2',
            '#0 all_reduce "layer 3 input_norm" [5 x 64 float32] split 2+1+0+2',
        ),
        (say_op, '#0 barrier "layer 3 input_norm"', '#0 all_reduce "layer 3 input_norm" [5 x 64 float32]'),
        (say_width, "[5 x 128 float32]", "[5 x 64 float32]"),
        (say_dtype, "[5 x 64 bfloat16]", "[5 x 64 float32]"),
        (say_counts, "split 1+2+0+2", "split 2+1+0+2"),
        (say_fields, "[5 x 64 float32]", "[5 x 64 float32, 5 x 8 int32]"),
        (say_rows_of_columns, "[4 x 8 float32]", "[5 x 8 float32]"),
        (say_root, '#0 broadcast "layer 3 input_norm" [5 float32] from rank 1', "[5 float32] from rank 0"),
        (say_number, "#2 all_reduce", "#1 all_reduce"),
    ],
)
def test_a_mismatch_names_each_rank_and_its_call(fn: Callable[[Communicator], object], odd: str, others: str) -> None:
    error, raised = errors_of(FOUR, fn)
    assert type(error) is CollectiveMismatchError
    one, rest = str(error).split(", ranks 0, 1, 3 to ")
    assert "rank 2 came to " in one and odd in one
    assert others in rest
    assert set(raised) == set(ALL)
    for seen in raised.values():
        assert type(seen) is CollectiveMismatchError and str(seen) == str(error)


def test_every_rank_that_differs_is_named() -> None:
    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "step 1" if comm.rank < 2 else f"step {comm.rank}")

    error, _ = errors_of(FOUR, rank)
    assert str(error).endswith(
        'rank 2 came to #0 barrier "step 2", rank 3 to #0 barrier "step 3", ranks 0, 1 to #0 barrier "step 1"'
    )


def test_nothing_is_read_before_all_have_been_compared() -> None:
    """Rank 2's tensor would break the concatenation, but the error is the mismatch."""
    seen: list[str] = []

    def rank(comm: Communicator) -> None:
        width = 5 if comm.rank == 2 else 4
        try:
            comm.all_gather([torch.ones(1, width)], ALL, (1, 1, 1, 1), "rows")
        except RankError as error:
            seen.append(type(error).__name__)
            raise

    errors_of(FOUR, rank)
    assert seen == ["CollectiveMismatchError"] * 4


def test_an_unchecked_mismatch_ends_with_torchs_error() -> None:
    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "start")
        comm.all_gather([torch.ones(1, 5 if comm.rank == 2 else 4)], ALL, (1, 1, 1, 1), "rows")

    for _ in range(5):
        error, raised = errors_of(FOUR, rank, checked=False)
        assert type(error) is RuntimeError and "Sizes of tensors must match" in str(error)
        others = [seen for seen in raised.values() if seen is not error]
        assert len(others) == 3
        assert all(type(seen) is RankError and "failed first: RuntimeError: Sizes" in str(seen) for seen in others)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda w: w.all_gather([torch.ones(3, 2)], ALL, SPLIT, "x"), r"\(3, 2\).* say 2 rows"),
        (lambda w: w.all_gather([torch.ones(2)], ALL, SPLIT, "x"), r"\(2,\).* say 2 rows"),
        (lambda w: w.all_gather([torch.ones(2, 2)], ALL, (2, 3), "x"), "2 counts for 4 ranks"),
        (lambda w: w.all_reduce(torch.ones(2, 2), ALL, SPLIT, "x"), "say 5 rows"),
        (lambda w: w.reduce_scatter(torch.ones(4, 2), ALL, SPLIT, "x"), "say 5 rows"),
        (lambda w: w.column_gather(torch.ones(4, 3), ALL, (2, 2, 2, 2), "x"), "say 2 columns"),
        (lambda w: w.all_reduce(torch.ones(5, 2), ALL, SPLIT, "x", [torch.ones(5, 2)]), r"addend of \(5, 2\)"),
        (lambda w: w.all_reduce(torch.ones(5, 2, dtype=torch.int64), ALL, SPLIT, "x"), "torch.int64"),
        (lambda w: w.all_reduce(torch.ones(5, 2, dtype=torch.float64), ALL, SPLIT, "x"), "torch.float64"),
    ],
)
def test_a_tensor_that_does_not_fit_its_counts_is_refused(fn: Callable[[Communicator], object], text: str) -> None:
    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "start")
        if comm.rank == 0:
            fn(comm)
        else:
            comm.barrier(ALL, "x")

    error, raised = errors_of(FOUR, rank)
    assert type(error) is CollectiveMismatchError
    assert str(error).startswith("rank 0 came to #1 ") and '"x"' in str(error)
    with pytest.raises(CollectiveMismatchError, match=text):
        raise error
    assert all("rank 0 failed first" in str(raised[r]) for r in (1, 2, 3))


# --- a rank that does not come


@pytest.mark.parametrize("checked", [False, True])
def test_a_missing_rank_is_named_with_the_collective(checked: bool) -> None:
    def rank(comm: Communicator) -> None:
        comm.barrier(ALL, "start")
        if comm.rank != 2:
            comm.all_reduce(torch.ones(5, 2), ALL, SPLIT, "layer 7 experts")

    error, raised = errors_of(FOUR, rank, checked=checked, timeout_s=0.3)
    assert type(error) is RankError
    assert str(error).startswith("rank 2 did not come within 0.3 s")
    for r in (0, 1, 3):
        assert f'rank {r} waits at #1 all_reduce "layer 7 experts"' in str(error)
        assert isinstance(raised[r], RankError) and "rank 2 did not come" in str(raised[r])
    assert 'rank 2 last came to #0 barrier "start"' in str(error)


def test_ranks_that_wait_for_each_other_in_different_groups_are_named() -> None:
    """One rank idle and one not: the field's commonest deadlock."""

    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.barrier(ALL, "idle step")
        else:
            comm.barrier(FOUR.group(comm.rank, 1, 2), "attention sum")

    error, _ = errors_of(FOUR, rank, timeout_s=0.3)
    text = str(error)
    assert "did not come within 0.3 s" in text
    assert 'barrier "idle step"' in text and 'barrier "attention sum"' in text


def test_a_rank_without_any_collective_is_reported_as_never_arrived() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.barrier(ALL, "start")

    error, _ = errors_of(FOUR, rank, timeout_s=0.2)
    assert "ranks 1, 2, 3 did not come" in str(error) and "rank 3 never came" in str(error)


def test_a_rank_stuck_outside_collectives_is_named() -> None:
    release = threading.Event()

    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            release.wait(PATIENCE_S)
        else:
            comm.barrier(ALL, "start")

    try:
        with pytest.raises(RankError, match="rank 1 did not come") as told:
            run_ranks(FOUR, rank, timeout_s=0.3)
    finally:
        release.set()
    assert any("Still running" in note and "[1]" in note for note in told.value.__notes__)
    for thread in rank_threads():
        thread.join(PATIENCE_S)


def test_time_is_for_coming_not_for_the_work() -> None:
    """All have come; that the last one works longer than the others may be late is no failure."""
    shared = SharedState(Mesh.of(dp=1, tp=2), checked=False, timeout_s=0.05)

    def work(brought: list[int]) -> list[int]:
        time.sleep(0.2)
        return [sum(brought)] * 2

    results: list[int] = []
    first = threading.Thread(target=lambda: results.append(shared.rendezvous((0, 1)).meet(0, 3, work)))
    first.start()
    results.append(shared.rendezvous((0, 1)).meet(1, 4, work))
    first.join(PATIENCE_S)
    assert results == [7, 7]


def test_an_error_in_shared_work_reaches_every_rank() -> None:
    shared = SharedState(Mesh.of(dp=1, tp=2), checked=False, timeout_s=5)
    raised: list[BaseException] = []

    def work(brought: list[int]) -> list[int]:
        raise ArithmeticError("nan")

    def come(me: int) -> None:
        try:
            shared.rendezvous((0, 1)).meet(me, 0, work)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=come, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert {type(error) for error in raised} == {ArithmeticError, RankError}


def test_no_rank_may_skip_a_collective_because_it_holds_no_rows() -> None:
    """All members take part, also without rows; the error names the one that skips."""

    def rank(comm: Communicator) -> None:
        if SPLIT[comm.rank]:
            comm.all_gather([torch.ones(SPLIT[comm.rank], 2)], ALL, SPLIT, "rows")

    error, _ = errors_of(FOUR, rank, timeout_s=0.2)
    assert "rank 2 did not come" in str(error)


def test_a_rank_that_skipped_a_call_is_detected_at_the_next() -> None:
    """The next call has the same label, shape and number of collectives: only the count of calls tells them apart."""

    class Worker:
        def __init__(self, comm: Communicator) -> None:
            self.comm = comm

        def step(self, value: int, skips: int | None) -> Tensor | None:
            if skips == self.comm.rank:
                return None
            return self.comm.all_reduce(torch.full((2, 2), float(value)), (0, 1), (1, 1), "layer 0 sum")

    with ThreadRanks(Mesh.of(dp=1, tp=2), Worker, checked=True, timeout_s=20) as ranks:
        steps = [ranks.submit(Worker.step, value, 1 if value == 1 else None) for value in range(3)]
        assert [result.tolist() for result in steps[0].result(PATIENCE_S)] == [[[0.0, 0.0], [0.0, 0.0]]] * 2
        with pytest.raises(CollectiveMismatchError, match=r"in call 3.*in call 4|in call 4.*in call 3"):
            steps[1].result(PATIENCE_S)
