"""Ranks as threads: results, order, errors and ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import Future

import pytest
import torch
from patience import PATIENCE_S

from narrows.comm import Communicator
from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.ranks import ThreadRanks, run_ranks

TWO = Mesh.of(dp=1, tp=2)
THREE = Mesh.of(dp=3, tp=1)


def rank_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("narrows rank")]


class Counter:
    """A worker that keeps values, and sums over the ranks."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.ranks = tuple(range(comm.mesh.size))
        self.told: list[int] = []
        comm.barrier(self.ranks, "built")

    def tell(self, value: int, pause: float = 0.0) -> int:
        time.sleep(pause * self.comm.rank)
        self.told.append(value)
        return self.comm.rank * 100 + value

    def sum(self, value: float) -> float:
        x = torch.full((len(self.ranks), 1), value + self.comm.rank)
        return self.comm.all_reduce(x, self.ranks, (1,) * len(self.ranks), "sum")[0, 0].item()

    def all_told(self) -> list[int]:
        return list(self.told)

    def fail(self, rank: int) -> None:
        if self.comm.rank == rank:
            raise ArithmeticError("worker broke")
        self.comm.barrier(self.ranks, "after")

    def wait(self, event: threading.Event) -> str:
        event.wait(PATIENCE_S)
        return "done"


def test_run_ranks_returns_results_in_rank_order() -> None:
    threads = torch.get_num_threads()

    def rank(comm: Communicator) -> tuple[int, int, bool, bool]:
        time.sleep(0.02 * (comm.mesh.size - comm.rank))
        here = threading.current_thread() is threading.main_thread()
        return comm.rank, torch.get_num_threads(), torch.is_inference_mode_enabled(), here

    assert run_ranks(THREE, rank) == [(r, 1, True, False) for r in range(3)]
    assert run_ranks(Mesh.of(dp=1, tp=1), rank) == [(0, 1, True, False)]
    assert not rank_threads()
    assert torch.get_num_threads() == threads and not torch.is_inference_mode_enabled()


def test_calls_run_in_order() -> None:
    with ThreadRanks(THREE, Counter) as ranks:
        futures = [ranks.submit(Counter.tell, i, 0.001) for i in range(10)]
        last = ranks.submit(Counter.all_told)
        assert last.result(PATIENCE_S) == [list(range(10))] * 3
        assert [future.result(0) for future in futures] == [[i, 100 + i, 200 + i] for i in range(10)]


def test_calls_may_overlap() -> None:
    release = threading.Event()
    with ThreadRanks(TWO, Counter) as ranks:
        first, second = ranks.submit(Counter.wait, release), ranks.submit(Counter.sum, 1.5)
        assert not first.done() and not second.done()
        with pytest.raises(TimeoutError):
            first.result(0.01)
        release.set()
        assert second.result(PATIENCE_S) == [4.0, 4.0]
        assert first.result(0) == ["done", "done"]
        assert not first.cancel()


def test_all_ranks_see_one_order_of_many_callers() -> None:
    with ThreadRanks(THREE, Counter, checked=True) as ranks:
        futures: list[Future[list[int]]] = []
        callers = [
            threading.Thread(
                target=lambda k=k: futures.extend(ranks.submit(Counter.tell, 10 * k + i) for i in range(10))
            )
            for k in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        told = ranks.submit(Counter.all_told).result(PATIENCE_S)
        assert told[0] == told[1] == told[2] and sorted(told[0]) == list(range(40))
        assert all(future.done() for future in futures)


@pytest.mark.parametrize("broken", [0, 2])
def test_an_error_fails_its_call_and_later_ones(broken: int) -> None:
    with ThreadRanks(THREE, Counter, checked=True) as ranks:
        before = ranks.submit(Counter.sum, 1.0)
        bad = ranks.submit(Counter.fail, broken)
        after = ranks.submit(Counter.sum, 2.0)
        assert before.result(PATIENCE_S) == [6.0] * 3
        with pytest.raises(ArithmeticError, match="worker broke") as told:
            bad.result(PATIENCE_S)
        assert any(f"rank {broken}" in note for note in told.value.__notes__)
        for future in (after, ranks.submit(Counter.sum, 3.0), ranks.submit(Counter.tell, 1)):
            with pytest.raises(ArithmeticError, match="worker broke"):
                future.result(PATIENCE_S)
    assert not rank_threads()


def test_an_unknown_method_fails_the_call() -> None:
    def no_such(counter: Counter) -> None: ...

    with ThreadRanks(TWO, Counter) as ranks, pytest.raises(AttributeError, match="no_such"):
        ranks.submit(no_such).result(PATIENCE_S)


def test_errors_while_workers_are_built() -> None:
    def make(comm: Communicator) -> Counter:
        if comm.rank == 1:
            raise FileNotFoundError("model-00002-of-00002.safetensors")
        return Counter(comm)  # waits for rank 1

    with pytest.raises(FileNotFoundError, match="00002") as told:
        ThreadRanks(TWO, make)
    assert any("rank 1" in note for note in told.value.__notes__)
    assert not rank_threads()


def test_a_late_rank_is_named_after_the_timeout() -> None:
    release = threading.Event()

    class Uneven(Counter):
        def step(self) -> None:
            if self.comm.rank == 1:
                release.wait(PATIENCE_S)
            self.comm.barrier(self.ranks, "decode step 12")

    with ThreadRanks(TWO, Uneven, timeout_s=0.2) as ranks:
        with pytest.raises(RankError, match=r'rank 1 did not come within 0.2 s.*"decode step 12"'):
            ranks.submit(Uneven.step).result(PATIENCE_S)
        release.set()


def test_closed_ranks_refuse_calls() -> None:
    ranks = ThreadRanks(TWO, Counter)
    assert len(rank_threads()) == 2 and all(thread.daemon for thread in rank_threads())
    assert ranks.submit(Counter.sum, 0.0).result(PATIENCE_S) == [1.0, 1.0]
    ranks.close()
    ranks.close()
    assert not rank_threads()
    with pytest.raises(RankError, match="closed"):
        ranks.submit(Counter.sum, 0.0).result(PATIENCE_S)


def test_close_fails_pending_calls() -> None:
    class Stepper(Counter):
        def forever(self) -> None:
            while True:
                self.comm.barrier(self.ranks, "step")

    ranks = ThreadRanks(TWO, Stepper)
    running, queued = ranks.submit(Stepper.forever), ranks.submit(Counter.sum, 1.0)
    time.sleep(0.05)
    ranks.close()
    for future in (running, queued):
        with pytest.raises(RankError, match="closed"):
            future.result(0)
    assert not rank_threads()


def test_an_exception_in_a_with_block_ends_the_ranks() -> None:
    with pytest.raises(KeyboardInterrupt), ThreadRanks(TWO, Counter) as ranks:
        ranks.submit(Counter.sum, 1.0)
        raise KeyboardInterrupt
    assert not rank_threads()


def test_ranks_that_are_never_closed_end() -> None:
    ranks = ThreadRanks(TWO, Counter)
    ranks.submit(Counter.tell, 1).result(PATIENCE_S)
    threads = rank_threads()
    assert len(threads) == 2
    del ranks
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not rank_threads()


def test_an_interrupted_process_ends_while_ranks_work() -> None:
    """Daemon threads inside torch would abort the interpreter (exit code 134) if they were not ended first."""
    program = """
        import torch
        from narrows.ranks import ThreadRanks
        from narrows.layout import Mesh

        class Worker:
            def __init__(self, comm):
                self.comm = comm

            def spin(self):
                x = torch.ones(200, 200)
                while True:
                    x = torch.tanh(x @ x)
                    self.comm.all_reduce(x, (0, 1, 2, 3), (50, 50, 50, 50), "sum")

        ranks = ThreadRanks(Mesh.of(dp=1, tp=4), Worker)
        future = ranks.submit(Worker.spin)
        try:
            future.result(0.2)
        except TimeoutError:
            raise KeyboardInterrupt
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr
    assert ended.returncode in (1, 130, -2), (ended.returncode, ended.stderr)


def test_closed_ranks_keep_no_worker() -> None:
    """A worker holds a rank's weights, and a restart in the same process must not hold them twice."""
    alive: list[weakref.ref[Counter]] = []

    def make(comm: Communicator) -> Counter:
        worker = Counter(comm)
        alive.append(weakref.ref(worker))
        return worker

    ranks = ThreadRanks(TWO, make)
    assert all(ref() is not None for ref in alive)
    ranks.close()
    assert [ref() for ref in alive] == [None, None]
