"""Calls whose result many ask for at once: one call answers all who asked before it began, and calls have a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["SharedCall"]

T = TypeVar("T")


class SharedCall(Generic[T]):
    """Makes ``call`` for whoever asks. What is got was computed after it was asked for, so it is never stale.

    A call begins ``pause_s`` after the last one has ended at the earliest; all who ask meanwhile share it. So however
    many ask, the work stays the same.
    """

    def __init__(self, call: Callable[[], Awaitable[T]], pause_s: float) -> None:
        self._call, self._pause_s = call, pause_s
        self._next: asyncio.Task[T] | None = None
        self._running: asyncio.Task[T] | None = None
        self._rests_until = 0.0

    async def get(self) -> T:
        """The result of a call that begins from now on; who is cancelled leaves it to the others."""
        loop = asyncio.get_running_loop()
        if self._next is None or self._next.done() or self._next.get_loop() is not loop:
            self._next = loop.create_task(self._run(self._running))
        return await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        loop = asyncio.get_running_loop()
        if before is not None and not before.done() and before.get_loop() is loop:
            await asyncio.wait({before})
        if (rest := self._rests_until - loop.time()) > 0:
            await asyncio.sleep(min(rest, self._pause_s))
        self._running, self._next = self._next, None  # who asks from now on gets the next one
        try:
            return await self._call()
        finally:
            self._rests_until = loop.time() + self._pause_s
