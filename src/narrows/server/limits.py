"""Who may come in, and how large a body may be: ASGI middleware, before any route. Knows no models and no tokens."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narrows.server.answers import error_answer
from narrows.server.errors import ApiError

__all__ = ["ApiKeys", "BodyLimit", "key_of"]

OPEN_PATHS = frozenset({"/health"})
"""What answers without a key: load balancers have none."""


_KEY = "narrows.api_key"
"""Where a request's scope has the number of its key."""


def key_of(scope: Scope) -> int | None:
    """Which of the server's API keys a request came with, counted from 0; None: the server asks for none."""
    key = scope.get(_KEY)
    assert key is None or isinstance(key, int)
    return key


class ApiKeys:
    """Lets requests in that carry ``Authorization: Bearer KEY`` with one of ``keys``; all of them if there are none.

    Which of them it was, :func:`key_of` says.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every key is compared, whatever the ones before gave: the time taken says nothing about which was close.
        fits = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
        if scheme.lower() == "bearer" and any(fits):
            scope[_KEY] = fits.index(True)
            return await self._app(scope, receive, send)
        what = "the API key is not one of this server's" if given else "this server asks for an API key"
        message = f"{what}: send the header 'Authorization: Bearer KEY'"
        headers = {"www-authenticate": "Bearer"}
        answer = error_answer(ApiError(401, message, code="invalid_api_key", headers=headers))
        await answer(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than ``max_bytes`` (413), told beforehand or found out, and those that stall (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a body that is counted as it comes."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._max_bytes:
            answer = error_answer(_too_large(self._max_bytes, f"{int(told)} bytes"))
            return await answer(scope, receive, send)
        num_bytes = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {self._timeout_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise HTTPException(413, _too_large(self._max_bytes, "more").message)
            return message

        await self._app(scope, counted, send)


def _too_large(max_bytes: int, size: str) -> ApiError:
    return ApiError(413, f"the body has {size}; this server takes {max_bytes} bytes at most (--max-body-mb)")
