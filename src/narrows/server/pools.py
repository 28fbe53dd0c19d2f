"""The threads of a server, apart by what they are for, so that no kind of work waits for another.

Requests are prepared off the event loop. Whatever is large goes through one thread alone, which has a process do most
of it (:mod:`narrows.server.intake`); what is small is short work, for two threads: more would only wait for the
interpreter's lock, and make those wait longer who stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request

from narrows.server.errors import ClientGoneError
from narrows.server.free_memory import give_back

__all__ = ["LARGE_BYTES", "Pools", "disconnected"]

P = ParamSpec("P")
T = TypeVar("T")

_FREE_AFTER_S = 2.0
"""How long after the work: what follows at once would only ask for the memory again."""

LARGE_BYTES = 16 * 1024
"""A body of more bytes is large."""


class Pools:
    """One for health and metrics, one for what operators ask, and two for requests, by the size of their bodies."""

    def __init__(self) -> None:
        self._watch = ThreadPoolExecutor(2, thread_name_prefix="narrows watch")
        self._operate = ThreadPoolExecutor(1, thread_name_prefix="narrows operators")
        self._small = ThreadPoolExecutor(2, thread_name_prefix="narrows requests")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="narrows large requests")
        self._give_back = give_back
        self._is_asked = False

    async def look(self, call: Callable[[], T]) -> T:
        """What ``call`` returns; for health and metrics, which answer within milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._watch, call)

    async def operate(self, call: Callable[[], T]) -> T:
        """What ``call`` returns; for what an operator asks now and then, which may take seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._operate, call)

    def free_memory_soon(self) -> None:
        """Work that took much memory has ended: what is free goes back to the system, once for all that ends soon."""
        if not self._is_asked:
            self._is_asked = True
            asyncio.get_running_loop().call_later(_FREE_AFTER_S, self._free_memory)

    def _free_memory(self) -> None:
        self._is_asked = False
        self._watch.submit(self._give_back)

    async def prepare(self, request: Request, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``call`` returns, computed in the thread for requests of this size.

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
