"""The cache of compiled grammars, and the threads that fill it.

A grammar is compiled once for all requests that wait for it, and kept within bounds. It is tried in a child process
first, because a thread cannot be stopped; when no request waits for it any more, the trial ends with its process.
A failure is remembered for a while, so a bad grammar costs one trial however often it is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Generic, Protocol, TypeVar

import llguidance

from narrows.api import QueueFull
from narrows.errors import ConfigError, NarrowsError
from narrows.server.cpu_priority import GRAMMAR_NICE, lower_thread_priority
from narrows.server.structured_output.guide import Grammar, Memory
from narrows.server.structured_output.trial import Ended, GrammarLimits

__all__ = ["GrammarPool", "Grammars", "Trial"]

_RETRY_S = 2.0
"""When a slot of the queue should be free."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A grammar that is being compiled, and how many wait for it."""

    future: Future[Grammar]
    num_waiting: int = 0


@dataclass(slots=True)
class _Failures:
    """Errors of grammars, by the hash of their text."""

    limits: GrammarLimits
    clock: Callable[[], float]
    _known: OrderedDict[bytes, tuple[float, str]] = field(default_factory=OrderedDict)

    def add(self, text: str, problem: str) -> None:
        """Remember one; beyond the limit the oldest is forgotten."""
        self._known[_hash(text)] = (self.clock() + self.limits.failed_s, problem)
        while len(self._known) > self.limits.num_failed:
            self._known.popitem(last=False)

    def of(self, text: str) -> str:
        """The recent error of this one; empty: none is known."""
        until, problem = self._known.get(_hash(text), (0.0, ""))
        return problem if self.clock() < until else ""


class Grammars:
    """Compiled grammars of one model's tokens. Any event loop may ask.

    Args:
        tokens: makes the model's tokens, at the first call.
        clock: seconds; failures are remembered by it.
    """

    def __init__(
        self,
        tokens: Callable[[], llguidance.LLTokenizer],
        trials: Sequence[Trial],
        limits: GrammarLimits,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._tokens, self._limits = tokens, limits
        self._pool: GrammarPool[Grammar] = GrammarPool(trials, self._compile)
        self._lock = threading.RLock()  # a finished future calls back at once
        self._pending: dict[str, _Pending] = {}
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._failures = _Failures(limits, clock)
        self.memory = Memory()
        self.num_compiled = 0
        """Grammars that were compiled here, ever."""

    async def get(self, text: str) -> Grammar:
        """The compiled grammar.

        Raises:
            ConfigError: it is invalid, or passes a limit; the message names it. QueueFull:
            too many others wait, or take too much memory.
        """
        if len(text) > self._limits.chars:
            raise ConfigError(
                f"the constraint is {len(text)} characters long as a grammar; at most {self._limits.chars} are compiled"
            )
        if (half := _half_pair(text)) is not None:
            raise ConfigError(f"the constraint is not valid Unicode: it has half of a surrogate pair (U+{half:04X})")
        with self._lock:
            if (kept := self._find(text)) is not None:
                return kept
            if problem := self._failures.of(text):
                raise ConfigError(problem)
            pending = self._pending.get(text) or self._begin(text)
            pending.num_waiting += 1
        try:
            return await _result(pending.future)
        finally:
            with self._lock:
                pending.num_waiting -= 1
                drops = not pending.num_waiting and not pending.future.done()
                if drops:
                    del self._pending[text]
            if drops:
                self._pool.drop(pending.future)

    def forget_broken(self) -> None:
        """Keep no grammar whose lexer has failed: the memory it has grown to is free once its texts have ended."""
        with self._lock:
            for text in [text for text, kept in self._kept.items() if kept.latest().is_broken]:
                del self._kept[text]

    def close(self) -> None:
        """End the threads and processes."""
        self._pool.close()

    def __len__(self) -> int:
        return len(self._kept)

    def _find(self, text: str) -> Grammar | None:
        """One that is kept and good for new texts."""
        kept = self._kept.pop(text, None)
        if kept is None or (kept := kept.latest()).is_broken:
            return None
        self._kept[text] = kept
        return kept

    def _forget_surplus(self) -> None:
        """Forget the least recently used, until the rest are few and small enough."""
        kept_bytes = sum(grammar.nbytes for grammar in self._kept.values())
        while self._kept and (len(self._kept) > self._limits.num_kept or kept_bytes > self._limits.kept_bytes):
            _, grammar = self._kept.popitem(last=False)
            kept_bytes -= grammar.nbytes

    def _begin(self, text: str) -> _Pending:
        if self._pool.num_waiting >= self._limits.num_waiting:
            message = f"{self._limits.num_waiting} constraints are waiting to be compiled; try again later"
            raise QueueFull(message, _RETRY_S)
        pending = self._pending[text] = _Pending(self._pool.submit(text))
        pending.future.add_done_callback(partial(self._done, text))
        return pending

    def _done(self, text: str, future: Future[Grammar]) -> None:
        """It was compiled, or failed, or was dropped; on whatever thread that was."""
        with self._lock:
            pending = self._pending.get(text)
            if pending is not None and pending.future is future:
                del self._pending[text]
            if future.cancelled():
                return
            if (error := future.exception()) is None:
                self._kept[text] = future.result()
                self._forget_surplus()
            elif isinstance(error, ConfigError):
                self._failures.add(text, str(error))

    def _compile(self, text: str, nbytes: int) -> Grammar:
        """On a thread of the pool, when its trial has passed."""
        nbytes += len(text)
        with self._lock:
            while self._kept and self.memory.used + nbytes > self._limits.total_bytes:
                self._kept.popitem(last=False)
        if self.memory.used + nbytes > self._limits.total_bytes:
            message = (
                f"the constraints in use take {self.memory.used >> 20} MB, this one {nbytes >> 20} MB, and together "
                f"they may take {self._limits.total_bytes >> 20} MB; try again later"
            )
            raise QueueFull(message, _RETRY_S)
        self.num_compiled += 1
        return Grammar(text, nbytes, self._tokens(), self._limits, self.memory)


async def _result(future: Future[Grammar]) -> Grammar:
    """The future's result; cancelling this call leaves the future alone."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def notify(_: Future[Grammar]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(notify)
    await done.wait()
    return future.result()


def _half_pair(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


_LOG = logging.getLogger("narrows.server")

T = TypeVar("T")


class Trial(Protocol):
    """A slot in which a grammar can be tried out; one at a time."""

    def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
        """The bytes that the compiled grammar takes; raises its error, or :class:`Ended`."""
        ...

    def end(self) -> None:
        """End the running trial, from any thread."""
        ...


class GrammarPool(Generic[T]):
    """One thread per slot for trials; each starts with its first job.

    Args:
        compile_: makes the result of a grammar's text and size in bytes, after its trial has passed.
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
        """The compiled grammar; raises its error."""
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
        """Cancel a grammar: it is not begun, or its trial ends. One that has passed its trial is finished."""
        if not future.cancel():
            return
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job[1] is not future)
            if (trial := self._trying.get(future)) is not None:
                trial.end()

    def close(self) -> None:
        """End the threads and their trials; waiting jobs are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _end_all(self._trials)

    def _work(self, trial: Trial) -> None:
        """The loop of a thread until the pool is closed."""
        lower_thread_priority(GRAMMAR_NICE)
        while (job := self._next(trial)) is not None:
            self._do(trial, *job)
            del job  # no reference keeps the grammar alive while there is no job

    def _do(self, trial: Trial, text: str, future: Future[T]) -> None:
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
    with suppress(InvalidStateError):  # cancelled a moment ago
        future.set_exception(error)


def _end_all(trials: Sequence[Trial]) -> None:
    for trial in trials:
        trial.end()
