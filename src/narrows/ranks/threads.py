"""Ranks as threads of one process, for tests, `verify` and examples.

Each rank thread runs in inference mode and with one torch thread unless more are given, since several per rank are slow
on a busy core. ``torch.set_num_threads`` in a thread also becomes the default of threads started later in this process;
threads that already run keep their number.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

from narrows.comm.communicator import Communicator
from narrows.comm.connect import connect_thread
from narrows.comm.device import rank_device
from narrows.comm.rendezvous import SharedState
from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.ranks.affinity import pin

__all__ = ["ThreadRanks", "run_ranks"]

T = TypeVar("T")
Worker = TypeVar("Worker")
P = ParamSpec("P")

CLOSE_GRACE_S = 5.0
"""How long :meth:`ThreadRanks.close` waits for a rank that is in the middle of something."""


class _Call(Generic[T]):
    """A call of every rank. ``method`` None makes the worker, with the function that is the argument."""

    def __init__(self, size: int, method: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.method = method
        self.args, self.kwargs = args, kwargs
        self.results: list[Any] = [None] * size
        self.missing = size
        self.future: Future[list[T]] = Future()
        self.future.set_running_or_notify_cancel()  # a rank cannot skip what the others do: no cancelling


class _Crew:
    """The rank threads and their calls. Each rank runs all calls, in the order they were made."""

    def __init__(
        self,
        mesh: Mesh,
        make: Callable[[Communicator], Any],
        *,
        checked: bool,
        timeout_s: float,
        num_threads: int = 1,
        device: str = "cpu",
    ) -> None:
        self.shared = SharedState(mesh, checked=checked, timeout_s=timeout_s)
        self.running = True
        self._num_threads, self._device = num_threads, device
        self._lock = threading.Lock()
        self._pending: list[_Call[Any]] = []
        self._queues: list[SimpleQueue[_Call[Any] | None]] = [SimpleQueue() for _ in range(mesh.size)]
        self.made = self.call(None, (make,))
        self._threads = [
            threading.Thread(target=self._serve, args=(rank,), name=f"narrows rank {rank}", daemon=True)
            for rank in range(mesh.size)
        ]
        for thread in self._threads:
            thread.start()

    def call(
        self, method: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Future[list[Any]]:
        """Hands a call to every rank. After a failure, or after the end, the future fails at once."""
        with self._lock:
            call: _Call[Any] = _Call(len(self._queues), method, args, kwargs)
            if self.running and self.shared.failure is None:
                self._pending.append(call)
                for queue in self._queues:
                    queue.put(call)
                return call.future
        call.future.set_exception(
            self.shared.failure[1] if self.shared.failure else RankError(f"{method} was called on closed ranks")
        )
        return call.future

    def stop(self, grace_s: float) -> list[int]:
        """Ends the threads; calls that are not done fail. Returns the ranks that still run after ``grace_s``."""
        with self._lock:
            self.running = False
            undone, self._pending = self._pending, []
        if undone:
            closed = RankError("the ranks were closed before they had done all calls")
            self.shared.fail(None, closed)
            for call in undone:
                call.future.set_exception(closed)
        self.dismiss()
        end = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if self.made.done() and not self.made.exception():
            self.made.result().clear()  # the workers, and with them their weights
        return [rank for rank, thread in enumerate(self._threads) if thread.is_alive()]

    def dismiss(self) -> None:
        """Asks the threads to end after the calls that they already have."""
        for queue in self._queues:
            queue.put(None)

    def _serve(self, rank: int) -> None:
        """The main function of a rank thread."""
        if self._device == "cpu":
            pin(rank, len(self._queues), self._num_threads)
        torch.set_num_threads(self._num_threads)
        comm = connect_thread(self.shared, rank, rank_device(self._device, 0))
        worker: Any = None
        with torch.inference_mode():
            while (call := self._queues[rank].get()) is not None:
                if call.future.done():  # it failed on another rank, or before it began
                    continue
                comm.call += 1
                try:
                    if call.method is None:
                        result = worker = call.args[0](comm)
                    else:
                        result = getattr(worker, call.method)(*call.args, **call.kwargs)
                except BaseException as error:
                    self._failed(call, rank, error)
                else:
                    self._done(call, rank, result)

    def _done(self, call: _Call[Any], rank: int, result: Any) -> None:
        with self._lock:
            call.results[rank] = result
            call.missing -= 1
            if call.missing or call not in self._pending:
                return
            self._pending.remove(call)
        call.args = ()  # what made the workers may hold a checkpoint open
        call.future.set_result(call.results)

    def _failed(self, call: _Call[Any], rank: int, error: BaseException) -> None:
        """Fails this call and all later ones, with the first error of any rank."""
        self.shared.fail(rank, error)
        assert self.shared.failure is not None
        with self._lock:
            at = self._pending.index(call) if call in self._pending else len(self._pending)
            self._pending, undone = self._pending[:at], self._pending[at:]
        for other in undone:
            other.future.set_exception(self.shared.failure[1])


def _stop_at_exit(crew: weakref.ref[_Crew]) -> None:
    if (alive := crew()) is not None:
        alive.stop(CLOSE_GRACE_S)


def run_ranks(
    mesh: Mesh, fn: Callable[[Communicator], T], *, checked: bool = False, timeout_s: float = 60.0
) -> list[T]:
    """Runs ``fn`` on every rank of ``mesh``, each in its own thread; returns the results in rank order.

    Args:
        checked: compare the ranks' fingerprints of a collective before any data is read.
        timeout_s: how long a rank may keep the others waiting at a collective.

    Raises:
        the first error of any rank, itself, with a note that names the rank. The other ranks end with a RankError at
        their next collective, or do not begin at all. All threads have ended when it is raised, except one that is
        busy outside of any collective for longer than ``timeout_s`` (a note names it).
    """
    crew = _Crew(mesh, fn, checked=checked, timeout_s=timeout_s)
    try:
        results: list[T] = crew.made.result()
    except BaseException as error:
        if stuck := crew.stop(timeout_s):
            error.add_note(f"Still running, outside of any collective: ranks {stuck}.")
        raise
    results = list(results)
    crew.stop(timeout_s)
    return results


class ThreadRanks(Generic[Worker]):
    """Rank threads with one worker each, which every call runs on, in the order of the calls.

    Args:
        make: builds the worker of a rank, in that rank's thread; it may use collectives.
        checked: compare the ranks' fingerprints of a collective before any data is read.
        timeout_s: how long a rank may keep the others waiting at a collective.
        num_threads: torch threads per rank.
        device: of the tensors in collectives. All ranks share it: one GPU runs their work in the order it is given,
            which is the order of the collectives.

    Raises:
        the first error of ``make`` on any rank.
    """

    def __init__(
        self,
        mesh: Mesh,
        make: Callable[[Communicator], Worker],
        *,
        checked: bool = False,
        timeout_s: float = 60.0,
        num_threads: int = 1,
        device: str = "cpu",
    ) -> None:
        self.transport = "memory of one process" if device == "cpu" else f"memory of one device ({device})"
        self._crew = _Crew(mesh, make, checked=checked, timeout_s=timeout_s, num_threads=num_threads, device=device)
        # For ranks that are never closed. The finalizer may run inside any code, even in a rank that holds a lock, so
        # it takes none. At exit, a rank thread that is still inside torch would abort the process.
        weakref.finalize(self, self._crew.dismiss).atexit = False
        atexit.register(_stop_at_exit, weakref.ref(self._crew))
        try:
            self._crew.made.result()
        except BaseException:
            self.close()
            raise

    @property
    def failure(self) -> BaseException | None:
        """The first error of a rank, after which no call runs any more; None while there is none."""
        failure = self._crew.shared.failure
        return failure[1] if failure else None

    def silence_s(self) -> tuple[float, ...]:
        """Zeros: threads stop only together with their process."""
        return (0.0,) * self._crew.shared.mesh.size

    def submit(self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """Calls the worker's method of that name on every rank, without waiting for it.

        Returns:
            a future whose ``result(timeout)`` is the list of the ranks' results, in rank order. It raises the first
            error of any rank in this call or an earlier one; RankError if the ranks were closed before it was done.
        """
        return self._crew.call(method.__name__, args, kwargs)

    def submit_first(
        self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`: among threads, fewer results save nothing."""
        return self.submit(method, *args, **kwargs)

    def close(self) -> None:
        """Ends the threads; calls that are not done fail with RankError. Closing again does nothing."""
        self._crew.stop(CLOSE_GRACE_S)

    def __enter__(self) -> ThreadRanks[Worker]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
