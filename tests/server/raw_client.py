"""A client that sends any bytes and reads the response, and a fake transport and clock for connections."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPResponse
from io import BufferedReader
from typing import Any

from narrows.server.http.round_robin import RoundRobin, WorkKind

__all__ = ["Answer", "AtOnce", "Clock", "RawClient", "Wire", "post"]


class Answer:
    """One answer, read to its end."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def message(self) -> str:
        """The error of a response, which has OpenAI's shape."""
        assert self.headers["content-type"] == "application/json", self.body
        return str(json.loads(self.body)["error"]["message"])


class _Lent:
    """Received bytes that are not read yet, lent to one response, which would close the socket at its end."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def makefile(self, mode: str) -> _Lent:
        return self

    def close(self) -> None:
        pass


class RawClient:
    """One connection; a context manager."""

    def __init__(self, port: int, *, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(20)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> bool:
        """Send all of it; False: the server has hung up."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def answer(self, method: str = "GET") -> Answer:
        """The next answer."""
        response = HTTPResponse(_Lent(self._file), method=method)  # type: ignore[arg-type]
        response.begin()
        return Answer(response)

    def get(self, path: str) -> Answer:
        """The response to a GET."""
        assert self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return self.answer()

    def rest(self) -> bytes:
        """Everything until the server closes."""
        pieces = []
        with suppress(ConnectionResetError):
            while piece := self._file.read1(1 << 16):
                pieces.append(piece)
        return b"".join(pieces)

    def has_come(self) -> bool:
        """Whether something, or the end, can be read now."""
        self.sock.setblocking(False)
        try:
            with suppress(ConnectionResetError):
                self.sock.recv(1, socket.MSG_PEEK)
            return True
        except BlockingIOError:
            return False
        finally:
            self.sock.settimeout(20)


def post(path: str, body: Any, *, version: str = "1.1", headers: str = "") -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Timer:
    """A call scheduled ``seconds`` after its request."""

    def __init__(self, clock: Clock, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call = seconds, call
        self._clock = clock

    def cancel(self) -> None:
        if self in self._clock.timers:
            self._clock.timers.remove(self)


class Clock:
    """An event loop as far as timers go: they ring when the test says so."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self, seconds, call))
        return self.timers[-1]

    def ring(self) -> None:
        """The last one's time has come."""
        self.timers.pop().call()


class AtOnce(RoundRobin):
    """Every piece of work runs at once, for tests without an event loop."""

    def call(self, kind: WorkKind, work: Callable[[], None]) -> None:
        work()


class Wire:
    """A transport whose reader the test is."""

    def __init__(self, sock: Any = None) -> None:
        self._socket = sock or NoSocket()
        self.unread = 0
        self.written = b""
        self.aborted = self.closing = self.paused = self.ended = False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closing = True


class NoSocket:
    family = None

    def fileno(self) -> int:
        raise OSError("there is none")

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getsockname = getpeername
