"""``/v1/messages`` and its ``count_tokens``: messages to the next one, whole or streamed. Knows HTTP only."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.server.answers import JsonAnswer, named_event
from narrows.server.conversation import (
    Conversation,
    Conversing,
    begin_conversation,
    conversation_prompt,
    read_conversation,
)
from narrows.server.errors import ApiError, error_body, renamed, translated
from narrows.server.intake import Body
from narrows.server.messages.request import CHAT_NAMES, chat_of
from narrows.server.messages.writer import MessageWriter
from narrows.server.reading import Reading
from narrows.server.respond import respond
from narrows.server.running import Running
from narrows.server.schema.chat import ChatRequest
from narrows.server.schema.messages import CountRequest, MessagesRequest
from narrows.server.state import ServerState

__all__ = ["PATH", "count_tokens", "create_message"]

PATH = "/v1/messages"


async def create_message(state: ServerState, body: Body[MessagesRequest], request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be served.
    """
    job = await body.begin(begin_conversation, _read)
    writer = MessageWriter(job.head["model"])
    with renamed(CHAT_NAMES):
        return await respond(
            state,
            request,
            job,
            "messages",
            stream=partial(_stream, writer),
            whole=partial(_whole, writer),
            wire=_Wire(),
        )


async def count_tokens(body: Body[CountRequest]) -> Response:
    """How many tokens the conversation has, as the model would read it.

    Raises:
        ApiError: it cannot be read.
    """
    return JsonAnswer({"input_tokens": await body.read(_count)})


def _chat(body: CountRequest) -> ChatRequest:
    with translated():
        return chat_of(body)


def _count(reading: Reading, body: CountRequest) -> int:
    reading.check_model(body.model)
    chat = _chat(body)
    with renamed(CHAT_NAMES):
        _, ids = conversation_prompt(reading, chat)
    return len(ids)


def _read(reading: Reading, body: MessagesRequest) -> Conversing:
    name = reading.check_model(body.model)
    chat = _chat(body)
    with renamed(CHAT_NAMES):
        return read_conversation(reading, chat, {"model": name}, capped=True)


class _Wire:
    """The API's events by name; the last one is ``message_stop``, or the error."""

    end = b""

    def event(self, event: Any) -> bytes:
        return named_event(event)

    def failure(self, error: ApiError) -> bytes:
        return named_event(error_body(error, PATH))


async def _stream(writer: MessageWriter, job: Conversation, running: Running) -> AsyncGenerator[dict[str, Any], None]:
    for event in writer.begin(job.usage):
        yield event
    async with aclosing(job.updates(running)) as updates:
        async for turns in updates:
            for turn in turns:
                events, _ = turn.take_events()
                for event in writer.take(events):
                    yield event
    for event in writer.end(*_why(job), job.usage):
        yield event


async def _whole(writer: MessageWriter, job: Conversation, running: Running) -> dict[str, Any]:
    async with aclosing(_stream(writer, job, running)) as events:
        async for _ in events:
            pass
    return writer.message


def _why(job: Conversation) -> tuple[str, str | None]:
    """Why the message ended, and the stop sequence that ended it."""
    (turn,) = job.choices
    if turn.finish_reason == "tool_calls":
        return "tool_use", None
    if turn.finish_reason == "length":
        asked = job.wishes.most_tokens
        cut = asked is not None and job.generations[0].max_tokens < asked
        return "model_context_window_exceeded" if cut else "max_tokens", None
    return ("stop_sequence", turn.stop_string) if turn.stop_string else ("end_turn", None)
