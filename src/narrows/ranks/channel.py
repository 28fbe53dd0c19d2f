"""Messages over one TCP connection between two processes that have proved to each other that they hold the same key.

Readers may unpickle what arrives, so nothing is read from a peer before it has proved the key. Nothing is encrypted.

A process that ends closes its connections, so its peer learns of it at once. Whether the other host still answers is
probed by the kernels (TCP keepalive), whatever the two processes compute.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import socket
import struct
import threading
from time import monotonic

from narrows.ranks.timing import TIMING

__all__ = ["Channel", "keepalive_options", "listen", "resolve"]

_HEADER = struct.Struct("!cQ")  # kind, bytes that follow
_NONCE = 32
_MAC = 32
_HANDSHAKE_S = 10.0
_CHUNK = 1 << 20


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The address of ``host``, IPv4 first.

    Raises:
        OSError: it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(address[0]), port)


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on this address of this host alone; port 0 lets the system choose one that is free."""
    family, address = resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


class Channel:
    """One end of a connection. Any thread may send, and one thread receives.

    ``silence_s``: how long the other host may be unreachable.
    """

    def __init__(self, sock: socket.socket, silence_s: float = TIMING.silence_s) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in keepalive_options(silence_s).items():
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sock = sock
        self._sending = threading.Lock()
        self._received = bytearray()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    @classmethod
    def connect(cls, host: str, port: int, key: bytes, silence_s: float = TIMING.silence_s) -> Channel:
        """Connects to a process that listens, and proves the key.

        Raises:
            OSError: no process listens there. EOFError: it holds another key.
        """
        family, address = resolve(host, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(_HANDSHAKE_S)
            sock.connect(address)
            theirs, mine = _read(sock, _NONCE), os.urandom(_NONCE)
            sock.sendall(mine + _mac(key, b"connects", theirs, mine))
            if not hmac.compare_digest(_read(sock, _MAC), _mac(key, b"listens", theirs, mine)):
                raise EOFError("the process that listens there holds another key")
            return cls(sock, silence_s)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def accept(cls, sock: socket.socket, key: bytes, silence_s: float = TIMING.silence_s) -> Channel:
        """The listener's end of a connection that was just accepted.

        Raises:
            OSError, EOFError: the other end closed it, sent nothing for 10 s, or holds another key.
        """
        try:
            sock.settimeout(_HANDSHAKE_S)
            mine = os.urandom(_NONCE)
            sock.sendall(mine)
            theirs = _read(sock, _NONCE)
            if not hmac.compare_digest(_read(sock, _MAC), _mac(key, b"connects", mine, theirs)):
                raise EOFError("a process with another key connected")
            sock.sendall(_mac(key, b"listens", mine, theirs))
            return cls(sock, silence_s)
        except BaseException:
            sock.close()
            raise

    @property
    def address(self) -> str:
        """This host's address on this connection: one that the other end can reach."""
        return str(self._sock.getsockname()[0])

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """Sends one whole message; waits while the other end does not read.

        Raises:
            OSError: the connection has ended.
        """
        with self._sending:
            if len(data) < _CHUNK:
                self._sock.sendall(_HEADER.pack(kind, len(data)) + data)
            else:
                self._sock.sendall(_HEADER.pack(kind, len(data)))
                self._sock.sendall(data)

    def try_send(self, kind: bytes, data: bytes = b"") -> None:
        """Sends a short message if that needs no waiting, else drops it; raises nothing."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError):  # the thread that receives learns of it
                if self._writable.poll(0):
                    self._sock.sendall(_HEADER.pack(kind, len(data)) + data)
        finally:
            self._sending.release()

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """The next message, as (kind, data); None if it has not arrived whole within ``timeout_s``.

        Raises:
            EOFError: the connection has ended.
        """
        end = monotonic() + timeout_s
        while (message := self._take()) is None:
            if not self._readable.poll(max(0.0, end - monotonic()) * 1e3):
                return None
            try:
                chunk = self._sock.recv(_CHUNK)
            except OSError as error:
                raise EOFError(str(error)) from None
            if not chunk:
                raise EOFError("the connection was closed")
            self._received += chunk
        return message

    def _take(self) -> tuple[bytes, bytes] | None:
        if len(self._received) < _HEADER.size:
            return None
        kind, size = _HEADER.unpack_from(self._received)
        stop = _HEADER.size + size
        if len(self._received) < stop:
            return None
        data = bytes(memoryview(self._received)[_HEADER.size : stop])
        del self._received[:stop]
        return kind, data

    def shut(self) -> None:
        """Ends the connection, which wakes all that wait in :meth:`send` or :meth:`receive` at either end."""
        with contextlib.suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and frees the socket; no thread may use it any more."""
        self.shut()
        self._sock.close()


def keepalive_options(silence_s: float) -> dict[str, int]:
    """Socket options that end the connection once the other host's kernel has not answered for ``silence_s``.

    The kernel's probes take 3 s at least.
    """
    idle_s, between_s = 2, 1
    return {
        "TCP_KEEPIDLE": idle_s,
        "TCP_KEEPALIVE": idle_s,  # macOS's name for it
        "TCP_KEEPINTVL": between_s,
        "TCP_KEEPCNT": min(max(int(silence_s) - idle_s, 1), 127),  # the most that Linux takes
        # While sent data is not acknowledged, nothing is probed.
        "TCP_USER_TIMEOUT": int(max(silence_s, idle_s + between_s) * 1000),
    }


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError("the other end closed the connection during the handshake")
        data += chunk
    return data


def _mac(key: bytes, role: bytes, listener: bytes, connector: bytes) -> bytes:
    return hmac.digest(key, role + listener + connector, "sha256")
