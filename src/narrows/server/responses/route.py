"""``/v1/responses``: input to output items, whole or streamed. Nothing is stored. Knows HTTP only."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.sched.sampling import SamplingParams
from narrows.server.answers import named_event
from narrows.server.conversation import Conversation, Conversing, begin_conversation, read_conversation
from narrows.server.errors import ApiError, renamed, translated
from narrows.server.ids import new_id, now
from narrows.server.intake import Body
from narrows.server.reading import Reading
from narrows.server.respond import respond
from narrows.server.responses.request import CHAT_NAMES, chat_of
from narrows.server.responses.writer import ResponseWriter
from narrows.server.running import Running
from narrows.server.schema.responses import ResponsesRequest
from narrows.server.state import ServerState

__all__ = ["create_response"]


async def create_response(state: ServerState, body: Body[ResponsesRequest], request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be served.
    """
    job = await body.begin(begin_conversation, _read)
    writer = ResponseWriter(job.head, scored=job.wishes.logprobs is not None)
    with renamed(CHAT_NAMES):
        return await respond(
            state,
            request,
            job,
            "input",
            stream=partial(_stream, writer),
            whole=partial(_whole, writer),
            wire=_Wire(writer),
        )


def _read(reading: Reading, body: ResponsesRequest) -> Conversing:
    name = reading.check_model(body.model)
    with translated():
        chat = chat_of(body)
    with renamed(CHAT_NAMES):
        asked = read_conversation(reading, chat, {})
    return replace(asked, head=_head(body, asked.sampling, name))


def _head(body: ResponsesRequest, sampling: SamplingParams, name: str) -> dict[str, Any]:
    """All of a response that is known before the model speaks: the request, with what was left out filled in."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
    choice = body.tool_choice if body.tool_choice is not None else "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": now(),
        "completed_at": None,
        "model": name,
        "status": "in_progress",
        "background": False,
        "store": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "service_tier": "default",
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


class _Wire:
    """The API's events by name; what ends the stream is one of them."""

    end = b""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer

    def event(self, event: Any) -> bytes:
        return named_event(event)

    def failure(self, error: ApiError) -> bytes:
        return named_event(self._writer.fail(error))


async def _stream(writer: ResponseWriter, job: Conversation, running: Running) -> AsyncGenerator[dict[str, Any], None]:
    for event in writer.begin():
        yield event
    async with aclosing(job.updates(running)) as updates:
        async for turns in updates:
            for turn in turns:
                for event in writer.take(*turn.take_events()):
                    yield event
    for event in writer.end(job.choices[0].finish_reason or "stop", job.usage):
        yield event


async def _whole(writer: ResponseWriter, job: Conversation, running: Running) -> dict[str, Any]:
    async with aclosing(_stream(writer, job, running)) as events:
        async for _ in events:
            pass
    return writer.response
