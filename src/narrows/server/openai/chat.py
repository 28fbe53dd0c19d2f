"""``/v1/chat/completions``: a conversation to its next message, with reasoning and tool calls apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.server.conversation import ChatJob, ParsedChat, parse_chat, start_chat
from narrows.server.generation import RunningRequest, respond
from narrows.server.http.body import Body
from narrows.server.http.errors import invalid
from narrows.server.output import ChatOutput
from narrows.server.parsers.events import Arguments, Content, Event, Reasoning, ToolCall
from narrows.server.request import RequestReader, new_id, now
from narrows.server.schema.chat import ChatRequest
from narrows.server.state import ServerState

__all__ = ["chat_completions"]


async def chat_completions(state: ServerState, body: Body[ChatRequest], request: Request) -> Response:
    """The next message of a conversation."""
    job = await body.begin(start_chat, _read)
    return await respond(state, request, job, "messages", stream=_stream, whole=_whole)


def _read(reader: RequestReader, body: ChatRequest) -> ParsedChat:
    name = reader.check_model(body.model)
    _check(body)
    return parse_chat(reader, body, {"id": new_id("chatcmpl"), "created": now(), "model": name})


def _check(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true only", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream: true only", "stream_options")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(body, name) == 0:
            raise invalid(f"{name} is 0; a chat has an answer of at least 1 token", name)


async def _stream(job: ChatJob, running: RunningRequest) -> AsyncGenerator[dict[str, Any], None]:
    head = {**job.head, "object": "chat.completion.chunk"}
    no_usage = {"usage": None} if job.options.wants_usage else {}

    def chunk(turn: ChatOutput, delta: dict[str, Any], logprobs: list[dict[str, Any]], finish: str | None) -> Any:
        scores = {"content": logprobs} if logprobs else None
        entry = {"index": turn.index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        return {**head, "choices": [entry], **no_usage}

    for turn in job.choices:
        yield chunk(turn, {"role": "assistant", "content": ""}, [], None)
    async with aclosing(job.updates(running)) as updates:
        async for turns in updates:
            for turn in turns:
                events, logprobs = turn.take_events()
                for event in events:
                    yield chunk(turn, _delta(event), logprobs, None)
                    logprobs = []
                if logprobs or turn.finish_reason is not None:
                    yield chunk(turn, {}, logprobs, turn.finish_reason)
    if job.options.wants_usage:
        yield {**head, "choices": [], "usage": job.usage}


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, Content):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, ToolCall):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": new_id("call"), "type": "function", "function": function}]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


async def _whole(job: ChatJob, running: RunningRequest) -> dict[str, Any]:
    events: list[list[Event]] = [[] for _ in job.choices]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in job.choices]
    async with aclosing(job.updates(running)) as updates:
        async for turns in updates:
            for turn in turns:
                new, scores = turn.take_events()
                events[turn.index] += new
                logprobs[turn.index] += scores
    entries = [
        {
            "index": turn.index,
            "message": _message(events[turn.index]),
            "logprobs": {"content": logprobs[turn.index]} if job.options.logprobs is not None else None,
            "finish_reason": turn.finish_reason,
        }
        for turn in job.choices
    ]
    return {**job.head, "object": "chat.completion", "choices": entries, "usage": job.usage}


def _message(events: list[Event]) -> dict[str, Any]:
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    arguments: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if isinstance(event, Arguments):
            arguments[event.index].append(event.text)
    calls = [
        {
            "id": new_id("call"),
            "type": "function",
            "function": {"name": event.name, "arguments": "".join(arguments[event.index])},
        }
        for event in events
        if isinstance(event, ToolCall)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message
