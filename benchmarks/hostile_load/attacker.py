"""An attacker's way to one server: requests over HTTP, connections without any, and what came of them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import aiohttp

__all__ = ["CHATS", "COMPLETIONS", "Attack", "Attacker", "chat", "completion", "repeated", "together"]

CHATS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class Attacker:
    """Asks one server, and counts what came back (``outcomes``): a status, an error's name, or ``left``.

    Args:
        url: the server's.
        session: without limits; its base is ``url``.
        body_mb: millions of bytes that a large body has.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, body_mb: float) -> None:
        address = urlsplit(url)
        self._host, self._port = str(address.hostname), int(address.port or 80)
        self._session = session
        self.num_bytes = int(body_mb * 1e6)
        self.outcomes: Counter[str] = Counter()

    async def ask(self, path: str, body: bytes | dict[str, Any] | None = None, *, leave_after_s: float = 60.0) -> None:
        """One request, a GET if there is no body; its answer is read to the end unless the client leaves before."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        method = "GET" if data is None else "POST"
        outcome = "left"
        try:
            async with asyncio.timeout(leave_after_s):
                headers = {"content-type": "application/json"}
                async with self._session.request(method, path, data=data, headers=headers) as answer:
                    async for _ in answer.content.iter_any():
                        pass
                    outcome = str(answer.status)
        except TimeoutError:
            pass
        except (aiohttp.ClientError, OSError) as error:
            outcome = type(error).__name__
        finally:
            self.outcomes[outcome] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A bare connection; None if it is refused."""
        try:
            return await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            self.outcomes[type(error).__name__] += 1
            return None

    async def bare(self, talk: Callable[[asyncio.StreamWriter], Awaitable[None]], *, reads: bool = True) -> None:
        """One connection on which ``talk`` writes; then the server's answer is awaited, or left unread for good."""
        streams = await self.connect()
        if streams is None:
            return
        reader, writer = streams
        outcome = "left"
        try:
            if not reads:  # a small window: the server's side fills up at once
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                writer.transport.pause_reading()  # type: ignore[attr-defined]
            await talk(writer)
            if not reads:
                await asyncio.sleep(3600)
            outcome = (await reader.read(64)).partition(b"\r\n")[0].decode("latin-1")[9:12] or "closed"
        except OSError as error:
            outcome = type(error).__name__
        finally:
            self.outcomes[outcome] += 1
            writer.transport.abort()


Attack = Callable[[Attacker], Awaitable[None]]
"""Ends, or is ended; the first line of its docstring says what it does."""


def repeated(head: str, item: str, tail: str, num_bytes: int) -> bytes:
    """A body of at most ``num_bytes``: the item as often as fits, with commas between."""
    count = max((num_bytes - len(head) - len(tail)) // (len(item) + 1), 1)
    return (head + f"{item}," * (count - 1) + item + tail).encode()


def completion(**fields: Any) -> dict[str, Any]:
    """A small, valid body with some fields replaced."""
    return {"prompt": "x", "max_tokens": 2, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    """The same, for chats."""
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}


async def together(requests: Iterable[Awaitable[None]]) -> None:
    """All at once."""
    await asyncio.gather(*requests)
