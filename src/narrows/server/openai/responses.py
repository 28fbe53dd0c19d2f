"""``/v1/responses``: input items to output items, whole or streamed. Nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.sched.sampling import SamplingParams
from narrows.server.conversation import ChatJob, ParsedChat, parse_chat, respond_with_events, start_chat
from narrows.server.http.body import Body
from narrows.server.http.errors import ApiError, renaming_fields, validation_as_api_error
from narrows.server.openai.responses_request import CHAT_NAMES, ResponsesRequest, chat_of
from narrows.server.parsers.events import Content, Event, Reasoning, ToolCall
from narrows.server.request import RequestReader, new_id, now
from narrows.server.state import ServerState

__all__ = ["ResponseWriter", "responses"]


async def responses(state: ServerState, body: Body[ResponsesRequest], request: Request) -> Response:
    """The next items of a conversation; the server stores none."""
    job = await body.begin(start_chat, _read)
    writer = ResponseWriter(job.head, scored=job.options.logprobs is not None)
    with renaming_fields(CHAT_NAMES):
        return await respond_with_events(state, request, job, "input", writer)


def _read(reader: RequestReader, body: ResponsesRequest) -> ParsedChat:
    name = reader.check_model(body.model)
    with validation_as_api_error():
        chat = chat_of(body)
    with renaming_fields(CHAT_NAMES):
        parsed = parse_chat(reader, chat, {})
    return replace(parsed, head=_head(body, parsed.sampling, name))


def _head(body: ResponsesRequest, sampling: SamplingParams, name: str) -> dict[str, Any]:
    """The part of a response that is known before generation: the request, with defaults filled in."""
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


_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseWriter:
    """One response on its way. ``head`` is all that is known of it beforehand; ``scored``: its text has logprobs."""

    def __init__(self, head: dict[str, Any], *, scored: bool = False) -> None:
        self.answer = {**head, "status": "in_progress", "output": []}
        """The response as far as it has come; whole after :meth:`end`."""
        self._scored = scored
        self._num_events = 0
        self._items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text is still held back."""

    def begin(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events before the first token."""
        return [self._event(f"response.{name}", response=self.answer) for name in ("created", "in_progress")]

    def take(self, events: Sequence[Event], logprobs: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """The new parts as events."""
        out: list[dict[str, Any]] = []
        self._logprobs += logprobs
        for event in events:
            kind = _kind(event)
            if self._open is None or self._open.kind != kind or isinstance(event, ToolCall):
                out += self._close("completed")
                out += self._begin(kind, event)
            if not isinstance(event, ToolCall):
                out.append(self._more(event.text))
            self._logprobs = []
        return out

    def end(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events after the last token."""
        cut = job.choices[0].finish_reason == "length"
        status = "incomplete" if cut else "completed"
        out: list[dict[str, Any]] = []
        if self._open is None and not self._items:
            out += self._begin("message", Content(""))
        out += self._close(status)
        self.answer |= {
            "status": status,
            "output": self._items,
            "usage": _usage(job.usage),
            "completed_at": None if cut else now(),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }
        return [*out, self._event(f"response.{status}", response=self.answer)]

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a failed stream, with the finished items."""
        code = _ERROR_CODES.get(error.status, "server_error")
        failed = {"status": "failed", "output": self._items, "error": {"code": code, "message": error.message}}
        self.answer |= failed
        return self._event("response.failed", response=self.answer)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1, **fields}

    def _begin(self, kind: str, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Content):
            self._logprobs = _from_text(self._logprobs, event.text)
        self._open = item = _Item(kind, len(self._items), event.name if isinstance(event, ToolCall) else "")
        out = [self._event("response.output_item.added", output_index=item.index, item=item.value("in_progress"))]
        if kind != "function_call":
            part = item.part()
            out.append(self._event("response.content_part.added", **item.address, content_index=0, part=part))
        return out

    def _more(self, text: str) -> dict[str, Any]:
        item = self._open
        assert item is not None, "it was begun"
        item.pieces.append(text)
        if item.kind == "function_call":
            return self._event("response.function_call_arguments.delta", **item.address, delta=text)
        if item.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **item.address, content_index=0, delta=text)
        scores = self._logprobs if self._scored else []
        item.logprobs += scores
        name = "response.output_text.delta"
        return self._event(name, **item.address, content_index=0, delta=text, logprobs=scores)

    def _close(self, status: str) -> list[dict[str, Any]]:
        item, self._open = self._open, None
        if item is None:
            return []
        if item.kind == "message" and self._scored:
            item.logprobs += self._logprobs
        value = item.value(status)
        self._items.append(value)
        address = {**item.address, "content_index": 0}
        out = []
        if item.kind == "function_call":
            done = {"name": item.name, "arguments": item.text}
            out.append(self._event("response.function_call_arguments.done", **item.address, **done))
        elif item.kind == "reasoning":
            out.append(self._event("response.reasoning_text.done", **address, text=item.text))
        else:
            out.append(self._event("response.output_text.done", **address, text=item.text, logprobs=item.logprobs))
        if item.kind != "function_call":
            out.append(self._event("response.content_part.done", **address, part=item.part()))
        return [*out, self._event("response.output_item.done", output_index=item.index, item=value)]


class _Item:
    """An item that is being written."""

    def __init__(self, kind: str, index: int, name: str) -> None:
        self.kind = kind
        self.index = index
        self.name = name
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self._id = new_id({"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind])
        self._call_id = new_id("call")

    @property
    def text(self) -> str:
        """All that has come of it."""
        return "".join(self.pieces)

    @property
    def address(self) -> dict[str, Any]:
        """Where an event's text belongs."""
        return {"item_id": self._id, "output_index": self.index}

    def part(self) -> dict[str, Any]:
        """Its text as a content part, as far as it has come."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def value(self, status: str) -> dict[str, Any]:
        """The item as far as it has come."""
        head = {"id": self._id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**head, "call_id": self._call_id, "name": self.name, "arguments": self.text}
        parts = [self.part()] if status != "in_progress" else []
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": parts}
        return {**head, "role": "assistant", "content": parts}


def _from_text(logprobs: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Without the tokens in front of ``text``: those that ended a thought, or white space that belongs to nothing."""
    spelled, begin = b"".join(bytes(entry["bytes"]) for entry in logprobs), text.encode()
    at = spelled.find(begin) if begin else -1
    first = 0
    while at > 0 and (size := len(logprobs[first]["bytes"])) <= at:
        first, at = first + 1, at - size
    return logprobs[first:]


def _kind(event: Event) -> str:
    if isinstance(event, Content):
        return "message"
    return "reasoning" if isinstance(event, Reasoning) else "function_call"


def _usage(of_chat: dict[str, Any]) -> dict[str, Any]:
    cached = of_chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": of_chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": of_chat["completion_tokens"],
        "output_tokens_details": dict(of_chat["completion_tokens_details"]),
        "total_tokens": of_chat["total_tokens"],
    }
