"""Who may come in, and what a body may be: ASGI middleware, before any route. Knows no models and no tokens."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narrows.server.answers import error_answer
from narrows.server.errors import ApiError, is_messages_path

__all__ = ["RESERVED", "ApiKeys", "BodyLimit", "Encodings", "ReservedPlaces", "key_of"]

OPEN_PATHS = frozenset({"/health"})
"""What answers without a key: load balancers have none."""

PROBES = OPEN_PATHS | {"/metrics"}
"""What answers when all other places for connections are taken."""

RESERVED = "narrows.reserved"
"""In a scope's state: the connection has a reserved place, so it may ask for :data:`PROBES` only."""


class ReservedPlaces:
    """Answers 503 to requests on reserved places, unless they are probes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or scope["path"] in PROBES or not scope.get("state", {}).get(RESERVED):
            return await self._app(scope, receive, send)
        message = "all places for connections are taken (--max-connections); try again in a second"
        headers = {"connection": "close", "retry-after": "1"}
        answer = error_answer(ApiError(503, message, code="too_many_connections", headers=headers), scope["path"])
        await answer(scope, receive, send)


_KEY = "narrows.api_key"
"""Where a request's scope has the number of its key."""


def key_of(scope: Scope) -> int | None:
    """Which of the server's API keys a request came with, counted from 0; None: the server asks for none."""
    key = scope.get(_KEY)
    assert key is None or isinstance(key, int)
    return key


class ApiKeys:
    """Lets requests in that carry ``Authorization: Bearer KEY`` with one of ``keys``; all of them if there are none.

    On Anthropic's routes ``x-api-key: KEY`` does as well: what clients of that API send. Which of them it was,
    :func:`key_of` says.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = self._given(scope)
        # Every key is compared, whatever the ones before gave: the time taken says nothing about which was close.
        fits = [hmac.compare_digest(key, given.encode()) for key in self._keys]
        if given and any(fits):
            scope[_KEY] = fits.index(True)
            return await self._app(scope, receive, send)
        what = "the API key is not one of this server's" if given else "this server asks for an API key"
        message = f"{what}: send the header 'Authorization: Bearer KEY'"
        if is_messages_path(scope["path"]):
            message += " or 'x-api-key: KEY'"
        headers = {"www-authenticate": "Bearer"}
        answer = error_answer(ApiError(401, message, code="invalid_api_key", headers=headers), scope["path"])
        await answer(scope, receive, send)

    @staticmethod
    def _given(scope: Scope) -> str:
        """The key that a request carries; empty if none."""
        sent = Headers(scope=scope)
        scheme, _, given = sent.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and given.strip():
            return given.strip()
        return sent.get("x-api-key", "").strip() if is_messages_path(scope["path"]) else ""


class Encodings:
    """Refuses bodies that are compressed: 415 for ``Content-Encoding``, 501 for ``Transfer-Encoding``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or name the encoding that is not undone here."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        for status, header, plain in ((415, "content-encoding", "identity"), (501, "transfer-encoding", "chunked")):
            given = [each.strip() for value in headers.getlist(header) for each in value.lower().split(",")]
            unknown = ", ".join(each for each in given if each and each != plain)
            if unknown:
                message = f"the body comes with {header.title()}: {unknown[:100]}; this server takes it as it is only"
                error = ApiError(status, message, code="unsupported_encoding", headers={"accept-encoding": "identity"})
                return await error_answer(error, scope["path"])(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than ``max_bytes`` (413), told beforehand or found out, and those that stall (408).

    A body has ``timeout_s`` in all. Its client may keep the server waiting for ``wait_s``; each ``bytes_per_s`` that
    come win a second of that back, and never more than ``wait_s``.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, timeout_s: float, *, wait_s: float = math.inf, bytes_per_s: int = 1
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._bytes_per_s = bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a body that is counted as it comes."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._max_bytes:
            answer = error_answer(_too_large(self._max_bytes, f"{int(told)} bytes"), scope["path"])
            return await answer(scope, receive, send)
        now = asyncio.get_running_loop().time
        num_bytes = 0
        complete = False
        credit_s = self._wait_s
        end = now() + self._timeout_s

        async def counted() -> Message:
            nonlocal num_bytes, complete, credit_s
            if complete:
                return await receive()
            begun = now()
            allowed = min(end, begun + credit_s)
            try:
                async with asyncio.timeout_at(allowed):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow(num_bytes, in_time=allowed < end) from None
            num_new = len(message.get("body", b""))
            num_bytes += num_new
            credit_s = min(credit_s - (now() - begun) + num_new / self._bytes_per_s, self._wait_s)
            complete = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise HTTPException(413, _too_large(self._max_bytes, "more").message)
            return message

        await self._app(scope, counted, send)

    def _too_slow(self, num_bytes: int, *, in_time: bool) -> HTTPException:
        message = f"the body did not come within {self._timeout_s:g} s"
        if in_time:
            rate = f"{self._wait_s:g} s, or for {self._bytes_per_s} bytes a second"
            message = f"the body comes too slowly: of it, {num_bytes} bytes have come; this server waits {rate}"
        return HTTPException(408, message, headers={"connection": "close"})


def _too_large(max_bytes: int, size: str) -> ApiError:
    return ApiError(413, f"the body has {size}; this server takes {max_bytes} bytes at most (--max-body-mb)")
