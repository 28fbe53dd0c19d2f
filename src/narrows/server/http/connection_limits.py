"""Accepts connections, limits how many are open, and closes those whose clients do not read.

An event loop's own server accepts every waiting connection at once: with hundreds of them, no token is sent for tens of
milliseconds. :class:`Listener` accepts a few per round and leaves the others in the kernel's queue. When the process
has no file descriptor left, it uses a spare one to accept and close new connections, so that clients retry at once.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import math
import os
import resource
import socket
import struct
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from narrows.errors import ConfigError

__all__ = [
    "MAX_CONNECTIONS",
    "RESERVED_SLOTS",
    "ConnectionSlots",
    "Listener",
    "SlotHolder",
    "SlowReaderTimer",
    "connections_for",
    "raise_descriptor_limit",
    "unread_bytes",
]

_LOG = logging.getLogger("narrows.server")

_AT_ONCE = 4
_RETRY_S = 0.25
"""How long nothing is accepted after the system had no memory for one more connection."""
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Listener:
    """Accepts connections until it is closed; each gets a protocol of ``make``."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, bound: socket.socket, make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._loop, self._bound, self._make = loop, bound, make
        self._is_open = True
        self._is_short = False
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._connecting: set[asyncio.Task[None]] = set()
        bound.setblocking(False)
        loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Accept no more connections."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._bound)
            os.close(self._spare)

    async def wait_closed(self) -> None:
        """Wait until accepted connections have their protocol."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

    def _accept(self) -> None:
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
            task = self._loop.create_task(self._connect(client))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _fail(self, error: OSError) -> None:
        if not self._is_short:
            _LOG.warning("a connection could not be accepted (%s); further failures are not logged", error.strerror)
        self._is_short = True
        if error.errno in _NO_DESCRIPTOR:
            os.close(self._spare)
            with suppress(OSError):
                self._bound.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
        else:
            self._loop.remove_reader(self._bound)
            self._loop.call_later(_RETRY_S, self._resume)

    def _resume(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._bound, self._accept)

    async def _connect(self, client: socket.socket) -> None:
        client.setblocking(False)
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(self._make, client)
        except BaseException as error:
            client.close()
            if not isinstance(error, OSError):  # else it has gone already
                raise


_QUIET_S = 60.0
"""How long slots must have been free before the log says again that all are taken."""


class SlotHolder(Protocol):
    """A connection that has a slot."""

    def make_room(self) -> None:
        """Close; the slot goes to another connection."""
        ...


class ConnectionSlots:
    """``num`` slots, and ``num_reserved`` more for connections for /health and /metrics only.

    A connection that comes when all slots are taken takes that of the oldest one without a request under way. Without
    one, it gets a reserved slot. The log says once that slots have run out, and again only after some were
    free for a minute of ``clock``.
    """

    def __init__(self, num: int, num_reserved: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept = _Room(num)
        self._reserved = _Room(num_reserved)
        self._clock = clock
        self._free_since = -math.inf  # inf: none is free

    def __len__(self) -> int:
        """Connections that have a slot."""
        return len(self._kept.members) + len(self._reserved.members)

    def take(self, holder: SlotHolder) -> bool:
        """Give a new connection a slot, at which it waits; False: all are taken, it must be closed."""
        self._notice()
        for room in (self._kept, self._reserved):
            if room.makes_room():
                room.members.add(holder)
                room.waiting[holder] = None
                return True
        return False

    def works(self, holder: SlotHolder) -> bool:
        """A request of it is under way. Returns whether it may ask for anything; False: its slot is a reserved one."""
        if holder in self._reserved.members and self._kept.makes_room():
            self._reserved.remove(holder)
            self._kept.members.add(holder)
        for room in (self._kept, self._reserved):
            room.waiting.pop(holder, None)
        return holder in self._kept.members

    def waits(self, holder: SlotHolder) -> None:
        """It has no request under way; from now on it may have to make room."""
        for room in (self._kept, self._reserved):
            if holder in room.members:
                room.waiting[holder] = None

    def leave(self, holder: SlotHolder) -> None:
        """It is gone. One that has made room, or never had a slot, may say so too."""
        for room in (self._kept, self._reserved):
            room.remove(holder)
        if self._kept.has_free and self._free_since == math.inf:
            self._free_since = self._clock()

    def _notice(self) -> None:
        if self._kept.has_free:
            return
        if self._clock() - self._free_since >= _QUIET_S:
            _LOG.warning(
                "all %d connections are in use (--max-connections): the oldest idle one is closed for a new one; while "
                "none is idle, new requests get 503",
                self._kept.num,
            )
        self._free_since = math.inf


class _Room:
    """Slots of one kind. ``waiting``: those of its members that may have to make room, the oldest first."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.members: set[SlotHolder] = set()
        self.waiting: dict[SlotHolder, None] = {}

    @property
    def has_free(self) -> bool:
        return len(self.members) < self.num

    def makes_room(self) -> bool:
        """Whether a slot is free now; the oldest waiting member may have been closed for it."""
        if not self.has_free and self.waiting:
            oldest = next(iter(self.waiting))
            self.remove(oldest)
            oldest.make_room()
        return self.has_free

    def remove(self, holder: SlotHolder) -> None:
        self.members.discard(holder)
        self.waiting.pop(holder, None)


class SlowReaderTimer:
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
    """Bytes that the other end has not read: those held here, and those that the system reports in its buffers."""
    held = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError, RuntimeError):  # the system does not report it, or the transport has closed
            held += int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    return held


MAX_CONNECTIONS = 4096
"""Connections at once unless a flag says otherwise: more than texts may run and wait."""

RESERVED_SLOTS = 16
"""Connections beyond those, which may ask for /health and /metrics only."""

_MOST_DESCRIPTORS = 1 << 20
_OWN_DESCRIPTORS = 256
"""Kept for the model's files, pipes to ranks, and libraries; half of all where the limit is lower than twice that."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, as far as 2**20. Returns the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_for(requested: int | None, descriptors: int) -> tuple[int, str]:
    """The limit of connections and, where open files hold it below the usual, a line that says so.

    Raises:
        ConfigError: the flag asks for more connections than files may be open.
    """
    room = descriptors - min(_OWN_DESCRIPTORS, descriptors // 2) - RESERVED_SLOTS
    limit = f"this process may open {descriptors} files (ulimit -n), enough for {room} connections"
    if room < 1:
        raise ConfigError(f"{limit}; raise the limit to {2 * RESERVED_SLOTS + 1} at least")
    if requested is not None and requested > room:
        raise ConfigError(f"--max-connections is {requested}; {limit}: raise the limit or lower the flag")
    if requested is not None:
        return requested, ""
    if room < MAX_CONNECTIONS:
        return room, f"{limit}; further connections replace idle ones or are refused"
    return MAX_CONNECTIONS, ""
