"""The pool that compiles grammars: tried in a process first, then compiled here, one job after another per thread.

Knows texts of grammars; not who asks for them, nor what was compiled before. A trial that is no longer wanted is ended
with its process, so it costs nothing from then on. What has passed a trial is bounded, so it is compiled here, where no
thread can be ended.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from narrows.errors import NarrowsError
from narrows.server.grammar.process import Ended

__all__ = ["GrammarPool", "Trial"]

_LOG = logging.getLogger("narrows.server")

T = TypeVar("T")


class Trial(Protocol):
    """A place where a grammar can be tried out; one at a time."""

    def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
        """The bytes that the compiled grammar takes; raises what is wrong with it, or :class:`Ended`."""
        ...

    def end(self) -> None:
        """End what is being tried, from any thread."""
        ...


class GrammarPool(Generic[T]):
    """As many threads as there are places for trials; each starts when there is a job for it.

    Args:
        compile_: makes what is asked for of a grammar's text and the bytes that it takes, once its trial has passed.
    """

    def __init__(self, trials: Sequence[Trial], compile_: Callable[[str, int], T]) -> None:
        self._trials, self._compile = trials, compile_
        self._changed = threading.Condition()
        self._jobs: deque[tuple[str, Future[T]]] = deque()
        self._trying: dict[Future[T], Trial] = {}
        self._num_threads = self._num_idle = 0
        self._closed = False
        weakref.finalize(self, _end_all, tuple(trials))

    @property
    def num_waiting(self) -> int:
        """Grammars that no thread has taken yet."""
        return len(self._jobs)

    def submit(self, text: str) -> Future[T]:
        """What becomes of a grammar; raises what is wrong with it."""
        future: Future[T] = Future()
        with self._changed:
            self._jobs.append((text, future))
            self._changed.notify()
            if len(self._jobs) > self._num_idle and self._num_threads < len(self._trials):
                number, self._num_threads = self._num_threads, self._num_threads + 1
                name = f"narrows grammars {number}"
                threading.Thread(target=self._work, args=(self._trials[number],), name=name, daemon=True).start()
        return future

    def drop(self, future: Future[T]) -> None:
        """Nobody wants this one any more: it is not begun, or its trial is ended. What has passed it is finished."""
        if not future.cancel():
            return
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job[1] is not future)
            if (trial := self._trying.get(future)) is not None:
                trial.end()

    def close(self) -> None:
        """End the threads and what they try; what waits is never done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _end_all(self._trials)

    def _work(self, trial: Trial) -> None:
        """What a thread does until the pool is closed."""
        while (job := self._next(trial)) is not None:
            text, future = job
            try:
                nbytes = self._tried(trial, text, future)
                if future.set_running_or_notify_cancel():
                    future.set_result(self._compile(text, nbytes))
            except Ended:
                future.cancel()
            except Exception as error:
                _fail(future, error)
            except BaseException as error:  # llguidance's panics are no Exceptions
                _LOG.exception("a constraint could not be compiled")
                _fail(future, NarrowsError(f"the constraint could not be compiled ({type(error).__name__})"))

    def _tried(self, trial: Trial, text: str, future: Future[T]) -> int:
        try:
            return trial.try_out(text, lambda: not future.cancelled())
        finally:
            with self._changed:
                del self._trying[future]

    def _next(self, trial: Trial) -> tuple[str, Future[T]] | None:
        with self._changed:
            self._num_idle += 1
            while not self._jobs and not self._closed:
                self._changed.wait()
            self._num_idle -= 1
            if self._closed:
                return None
            job = self._jobs.popleft()
            self._trying[job[1]] = trial
            return job


def _fail(future: Future[T], error: Exception) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more, since a moment ago
        future.set_exception(error)


def _end_all(trials: Sequence[Trial]) -> None:
    for trial in trials:
        trial.end()
