"""The generations of one request, from the backend's thread to the event loop: submitted, awaited, aborted.

Knows updates and numbers; not text, nor what the updates are for. The backend's thread only appends to a list: it never
waits for a client. What a client has not read yet is kept as ids, at most as many as the request may generate.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol

from narrows.api import Backend, Generation, Update
from narrows.errors import NarrowsError
from narrows.server.errors import ApiError, refused
from narrows.server.turns import Kind, Turns

__all__ = ["Bridge", "Running", "Times"]


_AT_ONCE = 8
"""Generations that are submitted in one turn: each is looked at in full."""
_FREE_UPDATES = 2
"""So many updates of one token each are read without a turn: what a stream of one text gets at a time."""
_WORK_AT_ONCE = 32
"""What is read in one turn: a token counts for one, and each of its log-probabilities for a quarter more."""
_OF_LOGPROB = 0.25


class Times(Protocol):
    """Who wants to know when tokens came; all in seconds."""

    def first_token(self, seconds: float) -> None:
        """From the request to its first token."""
        ...

    def next_tokens(self, seconds: float, count: int) -> None:
        """From the update before to this one, which brought ``count`` tokens."""
        ...

    def ended(self, seconds: float, reason: str) -> None:
        """From the request to its end."""
        ...


class Bridge:
    """Carries updates to the event loop: one wake-up for all that have come since the last, whoever they are for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._arrived: list[tuple[Running, int, Update, float]] = []
        self._waking = False

    def deliver(self, running: Running, index: int, update: Update) -> None:
        """Take an update over; called on the backend's thread, and never waits."""
        with self._lock:
            self._arrived.append((running, index, update, perf_counter()))
            wake, self._waking = not self._waking, True
        if wake and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            self._waking = False
        for running, index, update, at in arrived:
            running.receive(index, update, at)


class Running:
    """The generations of one request. Whoever submits them calls :meth:`close` when nobody wants them any more.

    ``client``: on whose behalf they run; clients share what the backend has.
    """

    def __init__(self, backend: Backend, bridge: Bridge, times: Times, turns: Turns, client: str) -> None:
        self._backend = backend
        self._turns = turns
        self._client = client
        self._bridge = bridge
        self._times = times
        self._started_at = perf_counter()
        self._numbers: list[int] = []
        self._open: set[int] = set()
        self._latest: dict[int, float] = {}
        self._inbox: list[tuple[int, Update]] = []
        self._waiter: asyncio.Future[None] | None = None

    async def submit(self, generations: Sequence[Generation], param: str) -> None:
        """Hand all of them to the backend, or none; others get their turn in between.

        Raises:
            ApiError: it refuses one; ``param`` is the field that made it.
        """
        try:
            for index, generation in enumerate(generations):
                if not index % _AT_ONCE:
                    await self._turns.wait(Kind.RUNNING)
                self._open.add(index)
                deliver = partial(self._bridge.deliver, self, index)
                self._numbers.append(self._backend.submit(replace(generation, client=self._client), deliver))
        except BaseException as error:
            self._open.discard(len(self._numbers))
            self.close()
            if isinstance(error, NarrowsError):
                raise refused(error, param) from error
            raise

    def receive(self, index: int, update: Update, at: float) -> None:
        """An update has come, at that time."""
        if index not in self._open:
            return  # aborted meanwhile
        self._clock(index, update, at)
        if update.finish_reason:
            self._open.discard(index)
        self._inbox.append((index, update))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def updates(self) -> AsyncGenerator[list[tuple[int, Update]], None]:
        """What has come since the last, as (index of the generation, update), until all have ended.

        If that is much (a slow reader, a long prompt that is scored), it comes in parts; others get their turn between.

        Raises:
            ApiError: a generation failed, or was ended by somebody else.
        """
        while self._inbox or self._open:
            if not self._inbox:
                self._waiter = self._bridge.loop.create_future()
                await self._waiter
            inbox, self._inbox = self._inbox, []
            for _, update in inbox:
                _check(update)
            for number, (part, work) in enumerate(_parts(inbox)):
                if number or work > _FREE_UPDATES:
                    await self._turns.wait(Kind.RUNNING)
                yield part

    def abort(self, index: int) -> None:
        """Nobody wants this one any more."""
        if index in self._open:
            self._open.discard(index)
            self._backend.abort(self._numbers[index])
            self._times.ended(perf_counter() - self._started_at, "stop")

    def close(self) -> None:
        """Abort all that have not ended."""
        for index in sorted(self._open):
            self._open.discard(index)
            self._backend.abort(self._numbers[index])
            self._times.ended(perf_counter() - self._started_at, "abort")

    def _clock(self, index: int, update: Update, at: float) -> None:
        count = len(update.token_ids)
        if count:
            if index in self._latest:
                self._times.next_tokens(at - self._latest[index], count)
            else:
                self._times.first_token(at - self._started_at)
            self._latest[index] = at
        if update.finish_reason:
            self._times.ended(at - self._started_at, update.finish_reason)


def _parts(inbox: Sequence[tuple[int, Update]]) -> Iterator[tuple[list[tuple[int, Update]], float]]:
    """Updates in lists of about as much work as is done in one turn, each with its work."""
    part: list[tuple[int, Update]] = []
    work = 0.0
    for index, whole in inbox:
        for update in _cut(whole):
            part.append((index, update))
            work += _work_of(update)
            if work >= _WORK_AT_ONCE:
                yield part, work
                part, work = [], 0.0
    if part:
        yield part, work


def _work_of(update: Update) -> float:
    scores = len(update.prompt_logprobs)
    tokens = len(update.token_ids) + scores
    best = len(update.logprobs[0][1]) if update.logprobs else 0
    best_of_prompt = len(update.prompt_logprobs[-1].best) if scores else 0
    return max(1, tokens) + _OF_LOGPROB * (len(update.logprobs) * best + scores * best_of_prompt)


def _cut(update: Update) -> Iterator[Update]:
    """The update as several, if it has many scores of a prompt."""
    scores = update.prompt_logprobs
    if not scores:
        yield update
        return
    at_once = max(1, int(_WORK_AT_ONCE / (1 + _OF_LOGPROB * len(scores[-1].best))))
    last = (len(scores) - 1) // at_once * at_once
    for start in range(0, last, at_once):
        some = scores[start : start + at_once]
        yield Update(prompt_logprobs=some, num_cached_prompt=update.num_cached_prompt)
    yield replace(update, prompt_logprobs=scores[last:]) if last else update


def _check(update: Update) -> None:
    if update.finish_reason == "error":
        message = update.error or "the engine could not finish this generation"
        raise ApiError(500, message, code="engine_error")
    if update.finish_reason == "abort":
        message = update.error or "the server ended this generation before it was done; try again"
        raise ApiError(503, message, code="aborted")
