"""Clients that do not read their answers: how much waits for one, and an end once it has read nothing for long."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from contextlib import suppress

__all__ = ["ReaderWatch", "unread_bytes"]


class ReaderWatch:
    """Aborts a transport whose client has taken in nothing for ``timeout_s``, while something waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, timeout_s: float) -> None:
        self._loop = loop
        self._transport = transport
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._before = 0

    def start(self) -> None:
        """Watch from now on."""
        self.stop()
        self._before = unread_bytes(self._transport)
        self._timer = self._loop.call_later(self._timeout_s, self._look)

    def start_if_closing(self) -> None:
        """A transport that closes waits for its reader, without end: watch, unless it is done or watched already."""
        if self._timer is None and self._transport.is_closing() and self._transport.get_write_buffer_size():
            self.start()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        if unread_bytes(self._transport) < self._before:
            self.start()
        else:
            self._transport.abort()


def unread_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the other end has not taken in: those held here, and those that the system still has, if it tells."""
    held = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError, RuntimeError):  # it does not tell, or the transport has closed
            held += int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    return held
