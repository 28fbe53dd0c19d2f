"""How a request may be addressed: by which host, from which web page, and with a slash at the end or without.

A server on loopback without a key trusts whoever is on this machine. A web page that the user has open is not: its
scripts could ask the server, by a name of their own that leads here (DNS rebinding) or across origins. So there, the
Host and the Origin that browsers send must be known.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from narrows.errors import ConfigError
from narrows.server.answers import error_answer
from narrows.server.errors import ApiError

__all__ = ["Addresses", "TrailingSlash", "checked_origins", "hosts_to_check", "is_loopback"]

_PORT = re.compile(r":\d*$")
_HOST_NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class Addresses:
    """Refuses requests (403) whose Host is neither this machine nor in ``hosts``, and those of foreign web pages.

    A page is foreign unless its host passes as a Host would, or its origin is in ``origins``; ``*`` there stands for
    all. ``hosts`` None: nothing is refused.
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

    ``address`` is what the server is bound to, ``name`` how its user spelled it. Only loopback without a key is
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
