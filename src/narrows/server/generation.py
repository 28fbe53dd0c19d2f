"""The generations of one request: submitted to the backend, followed, answered as a stream or as a whole.

The backend's thread only appends to a list and never waits for a client. What a client has not read yet is kept as
token ids, at most as many as the request may generate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from narrows.api import Backend, Generation, Update
from narrows.errors import ConfigError, NarrowsError
from narrows.sched.limits import MOST_PRIORITY
from narrows.server.http.errors import ApiError, backend_error, invalid
from narrows.server.http.json_io import JsonAnswer, to_json_in_turns
from narrows.server.http.middleware import key_of
from narrows.server.http.round_robin import RoundRobin, WorkKind
from narrows.server.http.stream import DataLines, EventStream, StreamFormat, until_disconnect
from narrows.server.output import Count, usage
from narrows.server.request import AnswerOptions, new_id
from narrows.server.state import ServerState
from narrows.server.structured_output.constraints import Constraint
from narrows.server.structured_output.guide import GrammarGuide
from narrows.server.workers import LoopCalls

__all__ = ["Choice", "Job", "RunningRequest", "Times", "make_guides", "respond"]

_AT_ONCE = 8
"""Generations that are submitted in one turn; each is checked in full."""
_FREE_UPDATES = 2
"""Updates of one token that are read without waiting for a turn, as a stream of one text gets them."""
_WORK_AT_ONCE = 32
"""Work that is read in one turn: 1 for a token, and a quarter more for each of its log-probabilities."""
_OF_LOGPROB = 0.25


class Times(Protocol):
    """Receives the times of a request's tokens, in seconds."""

    def first_token(self, seconds: float) -> None:
        """From the request to its first token."""
        ...

    def next_tokens(self, seconds: float, count: int) -> None:
        """From the update before to this one, which brought ``count`` tokens."""
        ...

    def ended(self, seconds: float, reason: str) -> None:
        """From the request to its end."""
        ...


class RunningRequest:
    """The generations of one request; :meth:`close` aborts those that still run.

    ``client``: the client that they run for; clients share the backend's capacity.
    """

    def __init__(self, backend: Backend, calls: LoopCalls, times: Times, turns: RoundRobin, client: str) -> None:
        self._backend = backend
        self._turns = turns
        self._client = client
        self._calls = calls
        self._times = times
        self._started_at = perf_counter()
        self._numbers: list[int] = []
        self._open: set[int] = set()
        self._latest: dict[int, float] = {}
        self._inbox: list[tuple[int, Update]] = []
        self._waiter: asyncio.Future[None] | None = None

    async def submit(self, generations: Sequence[Generation], param: str) -> None:
        """Submit all of them to the backend, or none; other requests get turns in between.

        Raises:
            ApiError: it refuses one; ``param`` is the field that made it.
        """
        try:
            for index, generation in enumerate(generations):
                if not index % _AT_ONCE:
                    await self._turns.wait(WorkKind.RUNNING)
                self._open.add(index)
                deliver = partial(self._deliver, index)
                self._numbers.append(self._backend.submit(replace(generation, client=self._client), deliver))
        except BaseException as error:
            self._open.discard(len(self._numbers))
            self.close()
            if isinstance(error, NarrowsError):
                raise backend_error(error, param) from error
            raise

    def _deliver(self, index: int, update: Update) -> None:
        """An update has come; called on the backend's thread, and never waits."""
        self._calls.call(self._receive, index, update, perf_counter())

    def _receive(self, index: int, update: Update, at: float) -> None:
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
        """New updates, as (index of the generation, update), until all generations have ended.

        Many updates (a slow reader, a long scored prompt) come in parts, and other requests get turns in between.

        Raises:
            ApiError: a generation failed, or the backend ended it.
        """
        while self._inbox or self._open:
            if not self._inbox:
                self._waiter = self._calls.loop.create_future()
                await self._waiter
            inbox, self._inbox = self._inbox, []
            for _, update in inbox:
                _check(update)
            for number, (part, work) in enumerate(_parts(inbox)):
                if number or work > _FREE_UPDATES:
                    await self._turns.wait(WorkKind.RUNNING)
                yield part

    def abort(self, index: int) -> None:
        """End one generation, whose text is complete by a stop string."""
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
    """Updates in lists of about one turn's work, each with its work."""
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


_MANY_LOGPROBS = 20_000
"""An answer that may hold more is serialised off the event loop: it takes tens of milliseconds."""


class Choice(Protocol):
    """One text that is being generated. ``guide``: its constraint, or None."""

    guide: GrammarGuide | None

    @property
    def count(self) -> Count:
        """Its tokens so far."""
        ...

    def take(self, update: Update) -> bool:
        """Take an update in; whether the text is complete, so that its generation can be aborted."""
        ...


ChoiceT = TypeVar("ChoiceT", bound=Choice)


@dataclass(frozen=True, slots=True)
class Job(Generic[ChoiceT]):
    """A parsed request, ready to run. ``generations`` are one per choice, or none if nothing has to run.

    ``constraint``: the required format; its guides are made when the job is answered.
    """

    options: AnswerOptions
    head: dict[str, Any]
    """The fields that every chunk of the answer begins with."""
    num_prompt_tokens: int
    choices: list[ChoiceT]
    generations: list[Generation]
    constraint: Constraint | None = None

    @property
    def usage(self) -> dict[str, Any]:
        """Its tokens, as the API spells them."""
        return usage(self.num_prompt_tokens, [choice.count for choice in self.choices])

    async def updates(self, running: RunningRequest) -> AsyncGenerator[list[ChoiceT], None]:
        """The choices that have something new, until all have ended."""
        async with aclosing(running.updates()) as updates:
            async for inbox in updates:
                new: dict[int, ChoiceT] = {}
                for index, update in inbox:
                    new[index] = self.choices[index]
                    if new[index].take(update):
                        running.abort(index)
                yield list(new.values())


async def respond(
    state: ServerState,
    request: Request,
    job: Job[ChoiceT],
    param: str,
    *,
    stream: Callable[[Job[ChoiceT], RunningRequest], AsyncGenerator[dict[str, Any], None]],
    whole: Callable[[Job[ChoiceT], RunningRequest], Coroutine[Any, Any, dict[str, Any]]],
    stream_format: StreamFormat | None = None,
) -> Response:
    """The answer, as ``stream`` or ``whole`` makes it. The generations end with it in any case.

    ``param``: the field to name if the backend refuses a generation. ``stream_format``: how
    a stream is written; None: as :class:`~narrows.server.http.stream.DataLines`.

    Raises:
        ApiError: the backend refuses, the priority is not allowed, or the request times out.
    """
    timeout_s = state.options.request_timeout_s
    _check_priority(state, job.options.priority)
    num_logprobs = state.check_logprobs(job.generations)
    generations = job.generations
    if job.constraint is not None:
        making = make_guides(state, job.constraint, len(job.choices))
        guides = await until_disconnect(request, making, timeout_s=timeout_s, close=lambda: None, turns=state.turns)
        for choice, guide in zip(job.choices, guides, strict=True):
            choice.guide = guide
        generations = [replace(each, guide=guide) for each, guide in zip(generations, guides, strict=False)]
    client = _client_of(state, request) or new_id("request")
    running = RunningRequest(state.backend, state.loop_calls, state.metrics, state.turns, client)
    await running.submit(generations, param)

    def close() -> None:
        running.close()
        if job.constraint is not None and state.guides is not None:
            state.guides.grammars.forget_broken()
            state.pools.free_memory_soon()

    if job.options.stream:
        return EventStream(
            stream(job, running), stream_format or DataLines(), timeout_s=timeout_s, close=close, turns=state.turns
        )
    answer = await until_disconnect(request, whole(job, running), timeout_s=timeout_s, close=close, turns=state.turns)
    if num_logprobs > _MANY_LOGPROBS:
        return JsonAnswer(await state.pools.prepare(request, to_json_in_turns, answer))
    return JsonAnswer(answer)


def _client_of(state: ServerState, request: Request) -> str:
    """The request's API key where the server has several; empty: the request is its own client."""
    key = key_of(request.scope)
    return "" if key is None or len(state.options.api_keys) < 2 else f"key {key}"


def _check_priority(state: ServerState, priority: int) -> None:
    """
    Raises:
        ApiError: 400, more urgent than normal where that is not allowed.
    """
    if priority < 0 and not state.options.allow_priority:
        message = f"priority is {priority}: to be more urgent than normal (0) needs a server with --allow-priority"
        raise invalid(f"{message}; 1 to {MOST_PRIORITY} are less urgent", "priority")


async def make_guides(state: ServerState, constraint: Constraint, count: int) -> list[GrammarGuide]:
    """New guides, one for each of so many generations.

    Raises:
        ApiError: 400, naming the field: the form cannot be kept; 429: too many others wait.
    """
    param = constraint.param
    if state.guides is None:
        raise invalid(f"{state.model.names[0]} has no tokenizer.json, so {param} cannot be kept", param)
    try:
        return await state.guides.guides(
            constraint.forms, count, reasoning=constraint.reasoning, inside=constraint.inside
        )
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error
    except NarrowsError as error:
        raise backend_error(error, param) from error
