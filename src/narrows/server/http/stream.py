"""Answers on their way out: server-sent events, and clients that disconnect or run out of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from narrows.server.http.errors import ApiError, ClientGoneError
from narrows.server.http.json_io import to_json
from narrows.server.http.round_robin import RoundRobin, WorkKind

__all__ = ["DataLines", "EventStream", "NamedEvents", "StreamFormat", "until_disconnect"]

T = TypeVar("T")

_LAST_WORDS_S = 1.0
"""How long a stream that is over its time waits for a slow reader to take the error in."""


class StreamFormat(Protocol):
    """How an API writes a stream: its events, the event of a failure, and its end."""

    def event(self, event: Any) -> bytes:
        """An event that the answer consists of."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The end of a failed stream."""
        ...

    @property
    def end(self) -> bytes:
        """The end of a complete stream."""
        ...


class DataLines:
    """A :class:`StreamFormat` of ``data:`` lines without names, then ``[DONE]``: chat completions and completions."""

    end = b"data: [DONE]\n\n"

    def event(self, event: Any) -> bytes:
        """The event as one line."""
        return b"data: " + to_json(event) + b"\n\n"

    def failure(self, error: ApiError) -> bytes:
        """The error's body as the last line; no ``[DONE]`` follows it."""
        return self.event(error.body)


class NamedEvents:
    """A :class:`StreamFormat` of events named by their ``type``: responses and messages. The last event ends it.

    ``failure``: the event that says why a stream failed.
    """

    end = b""

    def __init__(self, failure: Callable[[ApiError], dict[str, Any]]) -> None:
        self._failure = failure

    def event(self, event: dict[str, Any]) -> bytes:
        """The event with its name."""
        name: str = event["type"]
        return b"event: " + name.encode() + b"\ndata: " + to_json(event) + b"\n\n"

    def failure(self, error: ApiError) -> bytes:
        """The event of a failure."""
        return self.event(self._failure(error))


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, T], *, timeout_s: float, close: Callable[[], None], turns: RoundRobin
) -> T:
    """The result of ``work``, which is cancelled when the client disconnects or the time is over.

    ``close`` is called in any case, at the end.

    Raises:
        ApiError: 504, the time is over; or an error of ``work``.
        ClientGoneError: the client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            await turns.wait(WorkKind.RUNNING)
            raise ClientGoneError
        raise _over_time(timeout_s)
    finally:
        close()
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """``events`` one by one, as ``stream_format`` writes them.

    An :class:`ApiError` in between becomes the last event. When the client disconnects, or the time is over, ``close``
    is called at once, even while a slow reader keeps a write waiting; and in any case at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        stream_format: StreamFormat,
        *,
        timeout_s: float,
        close: Callable[[], None],
        turns: RoundRobin,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._format = stream_format
        self._timeout_s = timeout_s
        self._close = close
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it has ended or the client is gone."""
        gone = asyncio.ensure_future(_disconnected(receive))
        writing = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait({gone, writing}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                return writing.result()
            if gone.done():  # many may leave at once
                await self._turns.wait(WorkKind.RUNNING)
            self._close()
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            if not gone.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._end(send, _over_time(self._timeout_s)), _LAST_WORDS_S)
        finally:
            self._close()
            for each in (writing, gone):
                each.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await _send(send, self._format.event(event))
            except ApiError as error:
                await self._end(send, error)
                return
        await _send(send, self._format.end, more=False)

    async def _end(self, send: Send, error: ApiError) -> None:
        await _send(send, self._format.failure(error), more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _over_time(timeout_s: float) -> ApiError:
    message = f"the request took longer than the server's --request-timeout of {timeout_s:g} s and was ended"
    return ApiError(504, message, code="request_timeout")
