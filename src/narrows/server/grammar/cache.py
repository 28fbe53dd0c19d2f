"""Grammars by their text: each compiled once for all who ask for it, kept for those who ask again, up to bounds.

Knows texts of grammars and who waits; not what they mean. A grammar that failed is remembered for a while too, so that
it costs one trial however often it is sent. When the last of those who wait for a grammar has gone, it is dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import llguidance

from narrows.api import QueueFull
from narrows.errors import ConfigError
from narrows.server.grammar.compiled import Grammar, Memory
from narrows.server.grammar.limits import GrammarLimits
from narrows.server.grammar.pool import GrammarPool, Trial

__all__ = ["Grammars"]

_RETRY_S = 2.0
"""When a place among those that wait should be free."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A grammar that is being compiled, and how many wait for it."""

    future: Future[Grammar]
    num_waiting: int = 0


@dataclass(slots=True)
class _Failures:
    """What was wrong with grammars, by the hash of their text."""

    limits: GrammarLimits
    clock: Callable[[], float]
    _known: OrderedDict[bytes, tuple[float, str]] = field(default_factory=OrderedDict)

    def add(self, text: str, problem: str) -> None:
        """Remember one; the oldest is forgotten where there are too many."""
        self._known[_hash(text)] = (self.clock() + self.limits.failed_s, problem)
        while len(self._known) > self.limits.num_failed:
            self._known.popitem(last=False)

    def of(self, text: str) -> str:
        """What was wrong with this one lately; empty: nothing that is known."""
        until, problem = self._known.get(_hash(text), (0.0, ""))
        return problem if self.clock() < until else ""


class Grammars:
    """Compiled grammars of one model's tokens. Any event loop may ask.

    Args:
        tokens: makes the model's tokens, at the first call.
        clock: seconds; what failed is remembered by it.
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
        self._lock = threading.RLock()  # a future that is done already is told of at once
        self._pending: dict[str, _Pending] = {}
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._failures = _Failures(limits, clock)
        self.memory = Memory()
        self.num_compiled = 0
        """Grammars that were compiled here, ever."""

    async def get(self, text: str) -> Grammar:
        """The compiled grammar.

        Raises:
            ConfigError: it is not valid, or passes a limit; the message says what.
            QueueFull: too many others wait, or take too much memory.
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

    def _begin(self, text: str) -> _Pending:
        if self._pool.num_waiting >= self._limits.num_waiting:
            message = f"{self._limits.num_waiting} constraints wait already to be compiled; try again later"
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
                while len(self._kept) > self._limits.num_kept:
                    self._kept.popitem(last=False)
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
    """The future's result; who is cancelled meanwhile leaves the future alone."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell(_: Future[Grammar]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(tell)
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
