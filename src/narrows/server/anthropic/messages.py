"""``/v1/messages`` and its ``count_tokens``: the next message, whole or streamed, in Anthropic's blocks and events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.server.anthropic.request import CHAT_NAMES, CountRequest, MessagesRequest, chat_of
from narrows.server.conversation import (
    ChatJob,
    ParsedChat,
    chat_prompt,
    parse_chat,
    respond_with_events,
    start_chat,
)
from narrows.server.http.body import Body
from narrows.server.http.errors import ApiError, error_body, renaming_fields, validation_as_api_error
from narrows.server.http.json_io import JsonAnswer
from narrows.server.parsers.events import Content, Event, Reasoning, ToolCall
from narrows.server.request import RequestReader, new_id
from narrows.server.schema.chat import ChatRequest
from narrows.server.state import ServerState

__all__ = ["PATH", "MessageWriter", "message_tokens", "messages"]

PATH = "/v1/messages"


async def messages(state: ServerState, body: Body[MessagesRequest], request: Request) -> Response:
    """The next message of a conversation, in Anthropic's format."""
    job = await body.begin(start_chat, _read)
    writer = MessageWriter(job.head["model"])
    with renaming_fields(CHAT_NAMES):
        return await respond_with_events(state, request, job, "messages", writer)


async def message_tokens(body: Body[CountRequest]) -> Response:
    """The number of tokens of a conversation, as the model would read it."""
    return JsonAnswer({"input_tokens": await body.read(_count)})


def _chat(body: CountRequest) -> ChatRequest:
    with validation_as_api_error():
        return chat_of(body)


def _count(reader: RequestReader, body: CountRequest) -> int:
    reader.check_model(body.model)
    chat = _chat(body)
    with renaming_fields(CHAT_NAMES):
        _, ids = chat_prompt(reader, chat)
    return len(ids)


def _read(reader: RequestReader, body: MessagesRequest) -> ParsedChat:
    name = reader.check_model(body.model)
    chat = _chat(body)
    with renaming_fields(CHAT_NAMES):
        return parse_chat(reader, chat, {"model": name}, capped=True)


def _why(job: ChatJob) -> tuple[str, str | None]:
    """Why the message ended, and the stop sequence that ended it."""
    (turn,) = job.choices
    if turn.finish_reason == "tool_calls":
        return "tool_use", None
    if turn.finish_reason == "length":
        requested = job.options.most_tokens
        cut = requested is not None and job.generations[0].max_tokens < requested
        return "model_context_window_exceeded" if cut else "max_tokens", None
    return ("stop_sequence", turn.stop_string) if turn.stop_string else ("end_turn", None)


_SIGNATURE = "unsigned"
"""The API signs reasoning to recognise it when it is sent back; clients drop reasoning without a signature."""


class MessageWriter:
    """Writes one message as blocks and events."""

    def __init__(self, model: str) -> None:
        self._head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": model}
        self._blocks: list[dict[str, Any]] = []
        self._open: _Block | None = None
        self.answer: dict[str, Any] = {}
        """The whole of it after :meth:`end`."""

    def begin(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events before the first token."""
        usage = job.usage
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}
        return [{"type": "message_start", "message": {**self._head, **empty}}, {"type": "ping"}]

    def take(self, events: Sequence[Event], logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The new parts as events; this API has no log-probabilities."""
        out: list[dict[str, Any]] = []
        for event in events:
            kind = _kind(event)
            if self._open is None or self._open.kind != kind or isinstance(event, ToolCall):
                out += self._close()
                out.append(self._begin(kind, event.name if isinstance(event, ToolCall) else ""))
            if not isinstance(event, ToolCall):
                assert self._open is not None, "it was begun"
                out.append(self._open.more(event.text))
        return out

    def end(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events after the last token."""
        stop_reason, stop_sequence = _why(job)
        usage = job.usage
        out: list[dict[str, Any]] = []
        if self._open is None and not self._blocks:
            out.append(self._begin("text", ""))
        out += self._close()
        why = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        self.answer = {**self._head, "content": self._blocks, **why, "usage": _usage(usage)}
        return [*out, {"type": "message_delta", "delta": why, "usage": _usage(usage)}, {"type": "message_stop"}]

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a failed stream."""
        return error_body(error, PATH)

    def _begin(self, kind: str, name: str) -> dict[str, Any]:
        self._open = _Block(kind, len(self._blocks), name)
        return {"type": "content_block_start", "index": self._open.index, "content_block": self._open.empty()}

    def _close(self) -> list[dict[str, Any]]:
        block, self._open = self._open, None
        if block is None:
            return []
        self._blocks.append(block.whole())
        signed = [block.delta("signature_delta", signature=_SIGNATURE)] if block.kind == "thinking" else []
        return [*signed, {"type": "content_block_stop", "index": block.index}]


class _Block:
    """A block that is being written."""

    def __init__(self, kind: str, index: int, name: str) -> None:
        self.kind = kind
        self.index = index
        self._use = {"id": new_id("toolu"), "name": name}
        self._pieces: list[str] = []

    def more(self, text: str) -> dict[str, Any]:
        """More of it, as an event."""
        self._pieces.append(text)
        if self.kind == "text":
            return self.delta("text_delta", text=text)
        if self.kind == "thinking":
            return self.delta("thinking_delta", thinking=text)
        return self.delta("input_json_delta", partial_json=text)

    def delta(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event inside the block."""
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, **fields}}

    def empty(self) -> dict[str, Any]:
        """The block as it begins."""
        if self.kind == "text":
            return {"type": "text", "text": ""}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", **self._use, "input": {}}

    def whole(self) -> dict[str, Any]:
        """The block as it ended."""
        text = "".join(self._pieces)
        if self.kind == "text":
            return {"type": "text", "text": text}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": text, "signature": _SIGNATURE}
        return {"type": "tool_use", **self._use, "input": _object(text)}


def _kind(event: Event) -> str:
    if isinstance(event, Content):
        return "text"
    return "thinking" if isinstance(event, Reasoning) else "tool_use"


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; those that are no JSON object, or not yet, under the key that the API has for such."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


def _usage(of_chat: dict[str, Any]) -> dict[str, Any]:
    """Token counts; the prompt's are split into cached ones and the rest."""
    cached = of_chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": of_chat["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": of_chat["completion_tokens"],
    }
