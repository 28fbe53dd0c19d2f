"""A process beside the attack that measures a server: /health on fresh connections, and one honest client's streams."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import aiohttp

from hostile_load.shares import first_in_line

__all__ = ["Seen", "Watch"]

_EVERY_S = 0.05
_PATIENCE_S = 10.0
"""After that a request to /health is sent again; the time goes on from the first one."""

_STREAM = {"prompt": "Once upon a time", "stream": True, "max_tokens": 600, "ignore_eos": True, "temperature": 0}


@dataclass(kw_only=True)
class Seen:
    """Figures of one watch, in seconds; each is the worst one.

    health: from a question to /health to the answer 200, refusals and other answers in between included.
    gap: from one event of a stream to the next, be it in a new stream because the first one broke off.
    first: from asking for a stream to its first event.
    """

    health: float = 0.0
    gap: float = 0.0
    first: float = 0.0
    num_events: int = 0
    num_broken: int = 0
    """Streams that were refused, or ended before their end."""


class Watch:
    """Begins at once, and ends with :meth:`end`. Its own process: no attacker's work delays its clocks."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(url, theirs), daemon=True)
        self._process.start()

    def end(self) -> Seen:
        """What was seen until now."""
        self._pipe.send("end")
        seen = self._pipe.recv()
        self._process.join()
        assert isinstance(seen, Seen)
        return seen


def _run(url: str, pipe: Connection) -> None:
    first_in_line()
    pipe.send(asyncio.run(_watch(url, pipe)))


async def _watch(url: str, pipe: Connection) -> Seen:
    seen = Seen()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    tasks = [asyncio.create_task(watch(url, seen)) for watch in (_healths, _streams)]
    await ended.wait()
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return seen


async def _healths(url: str, seen: Seen) -> None:
    """Ask every 50 ms, one question at a time."""
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(force_close=True)) as session:
        while True:
            sent_at = time.monotonic()
            try:
                while not await _is_healthy(session):
                    await asyncio.sleep(_EVERY_S)
            finally:
                seen.health = max(seen.health, time.monotonic() - sent_at)
            await asyncio.sleep(max(sent_at + _EVERY_S - time.monotonic(), 0))


async def _is_healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/health") as answer:
            await answer.read()
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def _streams(url: str, seen: Seen) -> None:
    """Read one stream after another; each failure is followed by another try, while the silence goes on."""
    silence = _Silence(seen)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        try:
            while True:
                try:
                    done = await _stream(session, silence)
                except (aiohttp.ClientError, OSError):
                    done = False
                if done:
                    silence.begin()
                else:
                    silence.broken()
                    await asyncio.sleep(_EVERY_S)
        finally:
            silence.over()


class _Silence:
    """The time since the last event, or since a new stream was requested."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self.begin()

    def begin(self) -> None:
        self._since, self._is_first = time.monotonic(), True

    def broken(self) -> None:
        self._seen.num_broken += 1

    def event(self) -> None:
        self.over()
        self._seen.num_events += 1
        self._since, self._is_first = time.monotonic(), False

    def over(self) -> None:
        silent_s = time.monotonic() - self._since
        if self._is_first:
            self._seen.first = max(self._seen.first, silent_s)
        else:
            self._seen.gap = max(self._seen.gap, silent_s)


async def _stream(session: aiohttp.ClientSession, silence: _Silence) -> bool:
    """One stream; whether it came to its end."""
    async with session.post("/v1/completions", json=_STREAM) as answer:
        if answer.status != 200:
            return False
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                return True
            if line.startswith(b"data: ") and b'"error"' not in line:
                silence.event()
    return False
