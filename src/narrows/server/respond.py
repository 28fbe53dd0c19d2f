"""A body as the generations it comes to, answered as a stream or as a whole. Knows neither chats nor completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from narrows.api import Generation, Update
from narrows.sched.limits import MOST_PRIORITY
from narrows.server.answers import DataLines, EventStream, JsonAnswer, Wire, to_json_in_turns, unless_gone
from narrows.server.asked import Wishes
from narrows.server.errors import invalid
from narrows.server.forms import Constraint, make_guides
from narrows.server.grammar.compiled import GrammarGuide
from narrows.server.limits import key_of
from narrows.server.running import Running
from narrows.server.state import ServerState
from narrows.server.usage import Count, usage

__all__ = ["Choice", "Job", "respond"]

_MANY_LOGPROBS = 20_000
"""An answer that may hold more is written off the event loop: some tens of milliseconds of work."""


class Choice(Protocol):
    """One text on its way. ``guide``: what holds it to its form, if there is one."""

    guide: GrammarGuide | None

    @property
    def count(self) -> Count:
        """Its tokens so far."""
        ...

    def take(self, update: Update) -> bool:
        """Take an update in; whether nobody wants more of this text."""
        ...


ChoiceT = TypeVar("ChoiceT", bound=Choice)


@dataclass(frozen=True, slots=True)
class Job(Generic[ChoiceT]):
    """What a body comes to. ``generations`` are one per choice, or none, if nothing has to run.

    ``constraint``: what the texts have to be; their guides are made when the job is answered.
    """

    wishes: Wishes
    head: dict[str, Any]
    """What every piece of the answer begins with."""
    num_prompt_tokens: int
    choices: list[ChoiceT]
    generations: list[Generation]
    constraint: Constraint | None = None

    @property
    def usage(self) -> dict[str, Any]:
        """Its tokens, as the API spells them."""
        return usage(self.num_prompt_tokens, [choice.count for choice in self.choices])

    async def updates(self, running: Running) -> AsyncGenerator[list[ChoiceT], None]:
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
    stream: Callable[[Job[ChoiceT], Running], AsyncGenerator[dict[str, Any], None]],
    whole: Callable[[Job[ChoiceT], Running], Coroutine[Any, Any, dict[str, Any]]],
    wire: Wire | None = None,
) -> Response:
    """The answer, as ``stream`` or ``whole`` makes it; whatever ends it, the generations are ended with it.

    ``param``: the field that is wrong if the backend refuses a generation. ``wire``: how a stream is written; None: as
    :class:`~narrows.server.answers.DataLines`.

    Raises:
        ApiError: the backend takes none of them, a priority that is not allowed, or the time is over.
    """
    timeout_s = state.options.request_timeout_s
    _check_priority(state, job.wishes.priority)
    num_logprobs = state.check_logprobs(job.generations)
    generations = job.generations
    if job.constraint is not None:
        making = make_guides(state, job.constraint, len(job.choices))
        guides = await unless_gone(request, making, timeout_s=timeout_s, close=lambda: None, turns=state.turns)
        for choice, guide in zip(job.choices, guides, strict=True):
            choice.guide = guide
        generations = [replace(each, guide=guide) for each, guide in zip(generations, guides, strict=False)]
    running = state.running(_client_of(state, request))
    await running.submit(generations, param)

    def close() -> None:
        running.close()
        if job.constraint is not None and state.guides is not None:
            state.guides.grammars.forget_broken()
            state.pools.free_memory_soon()

    if job.wishes.stream:
        return EventStream(
            stream(job, running), wire or DataLines(), timeout_s=timeout_s, close=close, turns=state.turns
        )
    answer = await unless_gone(request, whole(job, running), timeout_s=timeout_s, close=close, turns=state.turns)
    if num_logprobs > _MANY_LOGPROBS:
        return JsonAnswer(await state.pools.prepare(request, to_json_in_turns, answer))
    return JsonAnswer(answer)


def _client_of(state: ServerState, request: Request) -> str:
    """Its API key, if there are several to tell clients by; empty: none but the request itself."""
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
