"""One server process from bind to exit: ready, draining, closed.

First signal (Ctrl-C, SIGTERM): new requests are refused with 503 while running ones finish, up to a limit; then the
port is closed and the process ends. Second signal: it ends at once.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from narrows.api import Backend
from narrows.errors import ConfigError
from narrows.server.app import state_of
from narrows.server.gc_policy import FullCollections
from narrows.server.http.connection_limits import ConnectionSlots, Listener
from narrows.server.http.connections import Connection

__all__ = ["Drainable", "bind", "curl_line", "serve", "url_of"]

_GRACE_S = 5
"""Time for complete answers to reach their readers once the backend is done."""

_BACKLOG = 2048


class Drainable(Backend, Protocol):
    """A backend that can be drained and closed."""

    @property
    def failure(self) -> str:
        """Why it will never be ready again, in one line; empty as long as it may be."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing new and finish the rest; whether all was finished in time."""
        ...

    def close(self) -> None:
        """End now; running generations get a last update."""
        ...


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port, which does not listen yet: until it is ready, clients are refused. Port 0: any free.

    Raises:
        ConfigError: the host or port is not available.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from None
    return found


def url_of(bound: socket.socket) -> str:
    """Where clients find it; an address that means all interfaces is spelled as this machine's own."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, model: str, *, has_key: bool, chats: bool) -> str:
    """A command that tries the server."""
    headers = "-H 'Content-Type: application/json'" + (" -H 'Authorization: Bearer KEY'" if has_key else "")
    if chats:
        route, what = "chat/completions", '"messages":[{"role":"user","content":"Hello"}]'
    else:
        route, what = "completions", '"prompt":"Hello"'
    return f"""curl {url}/v1/{route} {headers} -d '{{"model":"{model}",{what},"max_tokens":32}}'"""


def serve(
    app: FastAPI, backend: Drainable, bound: socket.socket, *, drain_timeout_s: float, when_ready: Callable[[], None]
) -> int:
    """Serve until a signal has drained it, or the backend has failed for good. Returns the process's exit code.

    0: drained, even if requests were cut off at the limit. 1: a second signal came, or the backend failed.

    Raises:
        ConfigError: another process listens on the port by now.
    """
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {url_of(bound)}: {error}; give another --port") from None
    limits = state_of(app).options.connections
    slots = ConnectionSlots(limits.max_connections, limits.reserved_slots)
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits, slots=slots, turns=state_of(app).turns),  # type: ignore[arg-type]
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Server(config, app, backend, drain_timeout_s, when_ready)
    server.run(sockets=[bound])
    return server.exit_code


class _Server(uvicorn.Server):
    """Uvicorn whose first signal drains the backend before anything is closed."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        backend: Drainable,
        drain_timeout_s: float,
        when_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._state = state_of(app)
        self._backend = backend
        self._drain_timeout_s = drain_timeout_s
        self._when_ready = when_ready
        self._drains: threading.Thread | None = None
        self._collections = FullCollections()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, with doors of our own in place of its servers."""
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        given = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        make: Callable[[], asyncio.Protocol] = partial(self.config.http_protocol_class, **given)
        self.servers = [Listener(loop, each, make) for each in sockets or ()]  # type: ignore[misc]

    async def main_loop(self) -> None:
        """Uvicorn's, once the ready line is out."""
        self._when_ready()
        self._collections.begin()
        await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's, ten times a second: whether to end."""
        if self._backend.failure and self._drains is None:
            self.exit_code = 1
            return True
        self._collections.look(busy=bool(self.server_state.tasks))
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come; the first one starts to drain, on its own thread since that waits."""
        if self._drains is not None:
            self.exit_code = 1
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        self._drains = threading.Thread(target=self._drain, name="drain", daemon=True)
        self._drains.start()

    def _drain(self) -> None:
        try:
            if not self._backend.drain(self._drain_timeout_s):
                self._backend.close()  # running texts get their last update, and clients their error
        finally:
            self.should_exit = True
