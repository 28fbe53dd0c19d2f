"""Fair turns on the event loop: long work runs in pieces, one piece per round.

An event loop runs everything that is ready before it polls its sockets again. A thousand requests that arrive together
are one round of half a second, during which no stream gets a token. So such work waits for a turn. The kinds of work
alternate; within a kind, the order is first come, first served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import IntEnum

__all__ = ["RoundRobin", "WorkKind"]


class WorkKind(IntEnum):
    """The purpose of a piece of work; of two waiting kinds, each gets every second round."""

    PROBE = 0
    """A question to /health or /metrics."""
    RUNNING = 1
    """A request that has been taken: tokens of many texts, or its end."""
    NEW = 2
    """A request that has come."""


_Work = Callable[[], None] | asyncio.Future[None]


class RoundRobin:
    """Runs one piece of the waiting work in each round. A piece should take a millisecond at most."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin(None)

    def _begin(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._is_taken = False
        self._waiting: tuple[deque[_Work], ...] = tuple(deque() for _ in WorkKind)
        self._last = WorkKind.NEW

    @property
    def num_waiting(self) -> int:
        """Pieces that have not had their turn."""
        return sum(map(len, self._waiting))

    def call(self, kind: WorkKind, work: Callable[[], None]) -> None:
        """Call ``work`` at once if this round has no piece yet, else in its turn; from the event loop only."""
        if self._takes():
            work()
        else:
            self._waiting[kind].append(work)

    async def wait(self, kind: WorkKind) -> None:
        """Return in the caller's turn: at once, if this round has no piece yet."""
        if not self._takes():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[kind].append(turn)
            await turn

    def _takes(self) -> bool:
        """Whether this round's turn was free; it is taken now."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._begin(loop)
        if self._is_taken:
            return False
        self._is_taken = True
        loop.call_soon(self._next)
        return True

    def _next(self) -> None:
        """Schedule the next waiting piece for the next round, and this method after it."""
        loop = self._loop
        assert loop is not None, "a turn was taken"
        while (work := self._pop()) is not None:
            if not isinstance(work, asyncio.Future):
                loop.call_soon(work)
            elif not work.done():
                work.set_result(None)
            else:  # its waiter was cancelled
                continue
            loop.call_soon(self._next)
            return
        self._is_taken = False

    def _pop(self) -> _Work | None:
        for step in range(1, len(WorkKind) + 1):
            kind = WorkKind((self._last + step) % len(WorkKind))
            if self._waiting[kind]:
                self._last = kind
                return self._waiting[kind].popleft()
        return None
