"""Takes connections from a listening socket, a few in each round of the event loop.

An event loop's own server takes all that wait at once: hundreds of connections, tens of milliseconds, during which no
token reaches its reader. Here the others wait where the system keeps them. When the process has no descriptor left,
those that come are taken with one that was kept for this, and closed: they learn at once that they should try again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Door"]

_LOG = logging.getLogger("narrows.server")

_AT_ONCE = 4
_RETRY_S = 0.25
"""How long nobody is let in after the system had no memory for one more connection."""
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Door:
    """Lets clients in until it is closed; each gets a protocol of ``make``."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, bound: socket.socket, make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._loop, self._bound, self._make = loop, bound, make
        self._is_open = True
        self._is_short = False
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._greeting: set[asyncio.Task[None]] = set()
        bound.setblocking(False)
        loop.add_reader(bound, self._let_in)

    def close(self) -> None:
        """Let nobody in any more."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._bound)
            os.close(self._spare)

    async def wait_closed(self) -> None:
        """Those that are being let in have been."""
        await asyncio.gather(*self._greeting, return_exceptions=True)

    def _let_in(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, _ = self._bound.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                return self._fail(error)
            self._is_short = False
            task = self._loop.create_task(self._greet(client))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    def _fail(self, error: OSError) -> None:
        if not self._is_short:
            _LOG.warning("a connection could not be taken (%s); more of this is not told", error.strerror)
        self._is_short = True
        if error.errno in _NO_DESCRIPTOR:
            os.close(self._spare)
            with suppress(OSError):
                self._bound.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
        else:
            self._loop.remove_reader(self._bound)
            self._loop.call_later(_RETRY_S, self._open_again)

    def _open_again(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._bound, self._let_in)

    async def _greet(self, client: socket.socket) -> None:
        client.setblocking(False)
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(self._make, client)
        except BaseException as error:
            client.close()
            if not isinstance(error, OSError):  # else it has gone already
                raise
