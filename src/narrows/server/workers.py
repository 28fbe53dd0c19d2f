"""Threads for blocking work, and calls whose result many requests share.

Each kind of work has its own threads, so that none waits for another. Large bodies share one thread; small ones have
two, as more would only compete for the interpreter's lock with the streams.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from starlette.requests import Request

from narrows.server.child_process import give_back
from narrows.server.cpu_priority import BODY_NICE, lower_thread_priority
from narrows.server.http.errors import ClientGoneError
from narrows.server.http.round_robin import RoundRobin, WorkKind

__all__ = ["LARGE_BYTES", "LoopCalls", "Pools", "SharedCall", "disconnected"]

P = ParamSpec("P")
T = TypeVar("T")

_FREE_AFTER_S = 2.0
"""Delay after the work: work that follows at once would only allocate the memory again."""

LARGE_BYTES = 16 * 1024
"""A body of more bytes is large."""


class Pools:
    """Thread pools: for health and metrics, for operators' routes, and for requests with small and large bodies."""

    def __init__(self) -> None:
        gives_way: dict[str, Any] = {"initializer": lower_thread_priority, "initargs": (BODY_NICE,)}
        self._watch = ThreadPoolExecutor(2, thread_name_prefix="narrows watch")
        self._operate = ThreadPoolExecutor(1, thread_name_prefix="narrows operators", **gives_way)
        self._small = ThreadPoolExecutor(2, thread_name_prefix="narrows requests", **gives_way)
        self._large = ThreadPoolExecutor(1, thread_name_prefix="narrows large requests", **gives_way)
        self._give_back = give_back
        self._is_asked = False

    async def look(self, call: Callable[[], T]) -> T:
        """The result of ``call``; for health and metrics, which answer within milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._watch, call)

    async def operate(self, call: Callable[[], T]) -> T:
        """The result of ``call``; for rare calls of an operator, which may take seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._operate, call)

    def free_memory_soon(self) -> None:
        """Work that took much memory has ended: free memory returns to the system, once for all work that ends soon."""
        if not self._is_asked:
            self._is_asked = True
            asyncio.get_running_loop().call_later(_FREE_AFTER_S, self._free_memory)

    def _free_memory(self) -> None:
        self._is_asked = False
        self._watch.submit(self._give_back)

    async def prepare(self, request: Request, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``call``, computed in the thread for requests of this size.

        Raises:
            ClientGoneError: the client went away first; a call that had not begun is not made.
        """
        size = request.scope.get("narrows.body_bytes", 0)
        pool = self._large if size > LARGE_BYTES else self._small
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(pool, partial(call, *args, **kwargs))
        gone = asyncio.ensure_future(disconnected(request))
        both: set[asyncio.Future[Any]] = {done, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            raise ClientGoneError
        finally:
            done.cancel()
            gone.cancel()
            if pool is self._large:
                self.free_memory_soon()
            await asyncio.gather(gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone away; for requests whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class LoopCalls:
    """Calls made on an event loop for other threads: one wake-up for all that came since the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._is_waking = False

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Have ``function(*args)`` called on the loop, in the order of these calls; from any thread, never waits."""
        with self._lock:
            self._waiting.append((function, args))
            wakes, self._is_waking = not self._is_waking, True
        if wakes and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._is_waking = False
        for function, args in waiting:
            function(*args)


class SharedCall(Generic[T]):
    """Shares the results of ``call``. A result was computed after it was requested, so it is never stale.

    A call begins at least ``pause_s`` after the last one has ended; all requests until then share it. So the work does
    not grow with the number of requests. They continue with the result one by one, in turns: writing it fifty times at
    once would hold up the event loop.
    """

    def __init__(self, call: Callable[[], Awaitable[T]], pause_s: float, turns: RoundRobin) -> None:
        self._call, self._pause_s, self._turns = call, pause_s, turns
        self._next: asyncio.Task[T] | None = None
        self._running: asyncio.Task[T] | None = None
        self._rests_until = 0.0

    async def get(self) -> T:
        """The result of a call that begins from now on; cancelling leaves it to the others."""
        loop = asyncio.get_running_loop()
        if self._next is None or self._next.done() or self._next.get_loop() is not loop:
            self._next = loop.create_task(self._run(self._running))
        result = await asyncio.shield(self._next)
        await self._turns.wait(WorkKind.NEW)
        return result

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        loop = asyncio.get_running_loop()
        if before is not None and not before.done() and before.get_loop() is loop:
            await asyncio.wait({before})
        if (rest := self._rests_until - loop.time()) > 0:
            await asyncio.sleep(min(rest, self._pause_s))
        self._running, self._next = self._next, None  # later requests get the next one
        try:
            return await self._call()
        finally:
            self._rests_until = loop.time() + self._pause_s
