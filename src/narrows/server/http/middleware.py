"""ASGI middleware in front of every route: allowed hosts and origins, API keys, encodings, body sizes.

A server on loopback without a key trusts every user of this machine, but not the web pages that they have open. A
page's script could reach it across origins or by DNS rebinding, so the Host and Origin headers are checked there.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import re
from collections.abc import Collection, Iterable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narrows.errors import ConfigError
from narrows.server.http.errors import ApiError, is_messages_path
from narrows.server.http.json_io import error_answer

__all__ = [
    "RESERVED",
    "Addresses",
    "ApiKeys",
    "BodyLimit",
    "Encodings",
    "ReservedSlots",
    "TrailingSlash",
    "checked_origins",
    "hosts_to_check",
    "is_loopback",
    "key_of",
]

OPEN_PATHS = frozenset({"/health"})
"""Routes that need no key: load balancers have none."""

PROBES = OPEN_PATHS | {"/metrics"}
"""Routes that answer when all other slots for connections are taken."""

RESERVED = "narrows.reserved"
"""In a scope's state: the connection has a reserved slot, so it may ask for :data:`PROBES` only."""


class ReservedSlots:
    """Answers 503 to requests on reserved slots, unless they are probes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or scope["path"] in PROBES or not scope.get("state", {}).get(RESERVED):
            return await self._app(scope, receive, send)
        message = "all connections are in use (--max-connections); try again in a second"
        headers = {"connection": "close", "retry-after": "1"}
        answer = error_answer(ApiError(503, message, code="too_many_connections", headers=headers), scope["path"])
        await answer(scope, receive, send)


_KEY = "narrows.api_key"
"""Where a request's scope has the number of its key."""


def key_of(scope: Scope) -> int | None:
    """Which of the server's API keys a request came with, counted from 0; None: the server has no keys."""
    key = scope.get(_KEY)
    assert key is None or isinstance(key, int)
    return key


class ApiKeys:
    """Lets requests in that carry ``Authorization: Bearer KEY`` with one of ``keys``; without keys, all of them.

    On Anthropic's routes ``x-api-key: KEY`` works too, as clients of that API send it. :func:`key_of` says which key it
    was.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = self._given(scope)
        # Every key is compared, also after a match: so the time taken reveals nothing.
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
                message = (
                    f"the body comes with {header.title()}: {unknown[:100]}; this server accepts it uncompressed only"
                )
                error = ApiError(status, message, code="unsupported_encoding", headers={"accept-encoding": "identity"})
                return await error_answer(error, scope["path"])(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than ``max_bytes`` (413), by Content-Length or by count, and those that stall (408).

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
        """Pass the request on, with a body that is counted as it arrives."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            answer = error_answer(_too_large(self._max_bytes, f"{int(length)} bytes"), scope["path"])
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
            message = f"the body arrives too slowly: {num_bytes} bytes so far; this server waits {rate}"
        return HTTPException(408, message, headers={"connection": "close"})


def _too_large(max_bytes: int, size: str) -> ApiError:
    return ApiError(413, f"the body has {size}; this server accepts at most {max_bytes} bytes (--max-body-mb)")


_PORT = re.compile(r":\d*$")
_HOST_NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class Addresses:
    """Refuses requests (403) whose Host is neither this machine nor in ``hosts``, and those of foreign web pages.

    A page is foreign unless its host passes as a Host would, or its origin is in ``origins``; ``*`` there means all.
    ``hosts`` None: nothing is refused.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http" or self._hosts is None:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        for host in headers.getlist("host"):
            if host and not self._knows(_without_port(host)):
                message = f"the Host {host[:200]!r} is not this server's; start it with --allow-host or --api-key"
                return await error_answer(ApiError(403, message, code="foreign_host"), scope["path"])(
                    scope, receive, send
                )
        for origin in headers.getlist("origin"):
            if not self._may_come_from(origin):
                message = f"pages of {origin[:200]!r} may not use this server; start it with --allow-origin"
                return await error_answer(ApiError(403, message, code="foreign_origin"), scope["path"])(
                    scope, receive, send
                )
        await self._app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        assert self._hosts is not None
        return is_loopback(host) or host in self._hosts

    def _may_come_from(self, origin: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        scheme, _, host = origin.partition("://")
        if scheme in ("http", "https"):
            return self._knows(_without_port(host))
        return origin != "null"  # other schemes are applications' and extensions', which no page can send


class TrailingSlash:
    """Drops slashes at the end of a path: one handler answers with and without them, and nothing is redirected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without port and brackets, means this machine.

    >>> [is_loopback(host) for host in ("localhost", "app.localhost", "127.8.0.1", "::1", "127.0.0.1.example.com")]
    [True, True, True, True, False]
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def hosts_to_check(address: str, name: str, allowed: Iterable[str] | None, *, has_key: bool) -> frozenset[str] | None:
    """The hosts that requests may name beside this machine's own names; None: any.

    ``address`` is what the server is bound to, ``name`` its spelling by the user. Only loopback without a key is
    checked, or where hosts are given in ``allowed``; ``*`` among them ends the check.

    Raises:
        ConfigError: something in ``allowed`` is no host.
    """
    given = [_checked_host(host) for host in allowed or ()]
    if "*" in given or (not given and (has_key or not is_loopback(address))):
        return None
    return frozenset({*given, address, name.lower()})


def checked_origins(origins: Iterable[str] | None) -> tuple[str, ...]:
    """The origins as browsers send them.

    Raises:
        ConfigError: one is no origin.
    """
    given = tuple(origin.lower() for origin in origins or ())
    for origin in given:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"--allow-origin is {origin!r}; it must be scheme://host[:port] without a path, or *")
    return given


def _checked_host(host: str) -> str:
    found = _without_port(host)
    if host != "*" and not _HOST_NAME.fullmatch(found):
        raise ConfigError(f"--allow-host is {host!r}; it must be a name or an address, as in a request's Host, or *")
    return found


def _without_port(host: str) -> str:
    """A Host's name: in lower case, without port, brackets of IPv6, and the dot that may end it."""
    host = host.strip().lower()
    if host.startswith("["):
        inside, bracket, port = host[1:].partition("]")
        return inside if bracket and _PORT.sub("", port) == "" else host
    return _PORT.sub("", host).removesuffix(".")
