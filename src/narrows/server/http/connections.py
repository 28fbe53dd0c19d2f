"""One client connection: uvicorn's HTTP protocol, with limits on heads, bodies, pipelining and unread answers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from narrows.server.http.connection_limits import ConnectionSlots, SlowReaderTimer
from narrows.server.http.errors import ApiError
from narrows.server.http.json_io import to_json
from narrows.server.http.middleware import PROBES, RESERVED
from narrows.server.http.round_robin import RoundRobin, WorkKind
from narrows.server.options import ConnectionLimits

__all__ = ["Connection"]

_LINGER_S = 2.0
"""How long a refused client that still sends may take to read the answer."""
_FEW_CHUNKS = 1024
"""Most chunks of a body, however small they are."""
_PROBES = tuple(f"GET {path}".encode() for path in PROBES)


class Connection(HttpToolsProtocol):
    """A connection that has a slot in ``slots`` and keeps to ``limits``.

    It waits for its client, or works on the client's requests. While it waits, one deadline runs: for the first byte,
    then for the rest of a head. While it works, uvicorn and the routes have it, and only unread bytes are watched.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
        slots: ConnectionSlots,
        turns: RoundRobin,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._slots = slots
        self._turns = turns
        self._deadline: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._refusal: ApiError | None = None
        self._discards = False  # further input is thrown away
        self._is_last = False  # no request follows the one that is being answered
        self._in_head = self._in_body = False
        self._head_bytes = 0
        self._head_fields = 0
        self._undigested = 0  # bytes that no part of a request has come of yet
        self._ahead = 0  # bytes that came while a request waited behind another
        self._arrived: list[bytes] = []  # bytes that wait for their turn to be parsed
        self._has_turn = False
        self._num_chunks = self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: it waits at a slot, or has to go at once."""
        super().connection_made(transport)
        self._reader = SlowReaderTimer(self.loop, transport, self._limits.send_timeout_s)
        if self._slots.take(self):
            self._allow(self._limits.head_timeout_s)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by either side."""
        self._slots.leave(self)
        self._allow(None)
        self._reader.stop()
        self._arrived.clear()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            _mark_disconnected(self._running)  # uvicorn notifies the last request only

    def make_room(self) -> None:
        """Close at once: the slot is another's."""
        self.transport.abort()

    # Input from the client

    def data_received(self, data: bytes) -> None:
        """Parse a body's bytes at once, which is short work; possible requests in their turn."""
        if self._discards:
            return
        if self._in_body and not self._arrived:
            return self._parse(data)
        self._arrived.append(data)
        if len(self._arrived) == 1:
            self._turns.call(WorkKind.PROBE if data.startswith(_PROBES) else WorkKind.NEW, self._parse_arrived)
            if self._arrived:
                self.flow.pause_reading()

    def _parse_arrived(self) -> None:
        data = b"".join(self._arrived)
        self._arrived.clear()
        if data and not self.transport.is_closing():
            self.flow.resume_reading()
            self._has_turn = True
            try:
                self._parse(data)
            finally:
                self._has_turn = False

    def _parse(self, data: bytes) -> None:
        """Parse, and check unfinished parts: a head has a deadline, and nothing grows without bound."""
        if self._discards:
            return
        self._undigested += len(data)
        self._ahead = self._ahead + len(data) if self.pipeline else 0
        had_begun = self._in_head
        super().data_received(data)
        if self._discards or self.transport.is_closing():
            return
        if self._undigested > self._limits.max_head_bytes:
            self._refuse(self._too_large())
        elif self.pipeline and self._ahead > self._limits.max_head_bytes:
            self.flow.pause_reading()  # until the next of them begins
        elif not self._works and (self._deadline is None or self._in_head > had_begun):
            self._allow(self._limits.head_timeout_s)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        self._head_bytes = self._head_fields = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target has come."""
        self._count(len(url), fields=0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field has come: of the head, or behind a body. Those behind it are counted and dropped."""
        self._count(len(name) + len(value) + len(": \r\n"), fields=1)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: a request is under way, or waits behind one that is."""
        self._in_head = False
        self._undigested = 0
        if len(self.pipeline) >= self._limits.max_pipelined:
            self._stop_reading()
            raise _Enough
        super().on_headers_complete()
        self._in_body = True
        self._num_chunks = self._body_bytes = 0
        self._allow(None)
        if not self._slots.works(self):
            self.scope["state"][RESERVED] = True
        if self.pipeline:
            self.flow.resume_reading()  # uvicorn would not notice that the client leaves

    def on_body(self, body: bytes) -> None:
        """A chunk of a body has arrived, or a part of one."""
        self._undigested = 0
        self._num_chunks += 1
        self._body_bytes += len(body)
        if self._num_chunks > _FEW_CHUNKS + self._body_bytes // self._limits.min_chunk_bytes:
            self._refusal = self._too_small()
            raise _Enough
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request has come."""
        self._in_body = False
        self._undigested = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The bytes are not HTTP, or a callback above has refused them."""
        if not self._discards:
            self._refuse(self._refusal or ApiError(400, "this is not HTTP/1.1", code="bad_request"))

    # Output of the server

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        if self._has_turn:
            return self._begin(cycle, app)
        self._turns.call(WorkKind.NEW, partial(self._begin, cycle, app))  # it waited behind another

    def _begin(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not self.transport.is_closing():
            super()._start_asgi_task(cycle, partial(self._answer, cycle, app))

    async def _answer(self, cycle: RequestResponseCycle, app: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["http_version"] in ("0.9", "1.0"):
            cycle.waiting_for_100_continue = False
            send = _without_chunks(cycle, send)
        if RESERVED in cycle.scope["state"]:
            self._is_last = True
            send = _without_close(cycle, send)
        try:
            await app(scope, receive, send)
        finally:
            self.loop.call_soon(self._reader.start_if_closing)  # when uvicorn has seen how it ended

    def on_response_complete(self) -> None:
        """An answer is written: the next request begins, or the connection waits, or it was the last one here."""
        if self._is_last:
            return self._part()
        super().on_response_complete()
        self._reader.start_if_closing()
        if self._works or self.transport.is_closing():
            return
        if not self.flow.write_paused:
            self._slots.waits(self)
        if self._in_head:
            self._unset_keepalive_if_required()
            self._allow(self._limits.head_timeout_s)

    def pause_writing(self) -> None:
        """More of an answer waits to be read than is to be held."""
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._reader.stop()
        self._reader.start_if_closing()
        if not self._works and not self.transport.is_closing():
            self._slots.waits(self)

    def timeout_keep_alive_handler(self) -> None:
        """It was idle for too long."""
        super().timeout_keep_alive_handler()
        self._reader.start_if_closing()

    # Limits

    @property
    def _works(self) -> bool:
        """Whether a request is under way; the last one of those that have come ends last."""
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, num_bytes: int, fields: int) -> None:
        self._head_bytes += num_bytes
        self._head_fields += fields
        if self._head_bytes > self._limits.max_head_bytes:
            self._refusal = self._too_large()
            raise _Enough
        if self._head_fields > self._limits.max_headers:
            message = f"the request has more than {self._limits.max_headers} headers, the most that this server accepts"
            self._refusal = ApiError(431, message, code="headers_too_large")
            raise _Enough

    def _too_large(self) -> ApiError:
        most = self._limits.max_head_bytes
        message = f"the request's line and headers have more than {most} bytes, the most that this server accepts"
        return ApiError(431, message, code="headers_too_large")

    def _too_small(self) -> ApiError:
        mean, least = self._body_bytes / self._num_chunks, self._limits.min_chunk_bytes
        message = (
            f"the body comes in chunks of {mean:.0f} bytes on average; beyond the first {_FEW_CHUNKS:,}, this "
            f"server needs chunks of at least {least} bytes"
        )
        return ApiError(400, message, code="chunks_too_small")

    def _allow(self, seconds: float | None) -> None:
        """From now on, the client has so long to send a head; None: as long as it likes."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self._discards:
            self.transport.abort()
        elif self._in_head:
            message = f"the request's headers were not complete within {self._limits.head_timeout_s:g} s"
            self._say(ApiError(408, message, code="request_timeout"))
        else:  # a client that has sent no request expects no answer
            self.transport.close()
            self._reader.start_if_closing()

    def _refuse(self, error: ApiError) -> None:
        """Read no more from the client, because of an error in its last bytes."""
        last = self.cycle
        if not self._works:
            if self._in_body:
                self.transport.close()  # the rest of a body that was answered already
            else:
                self._say(error)
        elif last is self._running and last.more_body and not last.response_started:
            _mark_disconnected(last)
            self._say(error)
        else:
            self._stop_reading()

    def _say(self, error: ApiError) -> None:
        """Answer outside of any route, and close."""
        body = to_json(error.body)
        head = [*self.server_state.default_headers, (b"content-type", b"application/json")]
        head += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % field for field in head)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        self._part()

    def _part(self) -> None:
        """Close once the client, which may still send, has read the written bytes; or soon."""
        self._discards = True
        self.flow.resume_reading()
        self._slots.waits(self)
        self._allow(_LINGER_S)
        with suppress(OSError, RuntimeError):  # it has gone already
            self.transport.write_eof()

    def _stop_reading(self) -> None:
        """Answer the requests that have come completely, then close; another is dropped."""
        self._discards = True
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        assert last is not None
        self.cycle = last
        self.cycle.keep_alive = False


class _Enough(Exception):  # noqa: N818 - ends the parser's call, is no error
    """No more is parsed."""


def _mark_disconnected(cycle: RequestResponseCycle) -> None:
    """Tell a request's route that its client has disconnected."""
    cycle.disconnected = True
    cycle.message_event.set()


def _without_close(cycle: RequestResponseCycle, send: Send) -> Send:
    """``send`` for a last answer: it says ``Connection: close``, but leaves the closing to another."""

    async def sent(message: Message) -> None:
        cycle.keep_alive = message["type"] != "http.response.start"
        await send(message)
        cycle.keep_alive = True

    return sent


def _without_chunks(cycle: RequestResponseCycle, send: Send) -> Send:
    """``send`` for HTTP/1.0, which has no chunks: a body of unknown length ends with the connection."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            cycle.chunked_encoding = False
        else:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return sent
