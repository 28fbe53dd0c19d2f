"""``/v1/chat/completions``: a conversation to the next message, with reasoning and tool calls apart.

Knows fields, ids and text; what formats spell them in text is told by its parsers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.errors import ConfigError
from narrows.server.answers import JsonAnswer
from narrows.server.backend import Generation, Update
from narrows.server.errors import invalid, refused
from narrows.server.events import Arguments, Content, Event, Reasoning, ToolCall, joined
from narrows.server.forms import Constraint, asked_form
from narrows.server.grammar.compiled import GrammarGuide
from narrows.server.guides import Form
from narrows.server.logprobs import chat_logprob
from narrows.server.output import OutputParser
from narrows.server.prompts import render_chat
from narrows.server.reasoning import ReasoningSplit, begins_inside
from narrows.server.respond import Job, respond
from narrows.server.running import Running
from narrows.server.schema.chat import ChatRequest, NamedTool
from narrows.server.state import ServerState, new_id, now
from narrows.server.usage import Count
from narrows.text import GeneratedText

__all__ = ["chat"]


async def chat(state: ServerState, body: ChatRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be served.
    """
    name = state.check_model(body.model)
    job = await asyncio.to_thread(_job, state, body, name)
    return await respond(state, request, job, "messages", stream=_stream, whole=_whole)


def _job(state: ServerState, body: ChatRequest, name: str) -> _Job:
    """What a body comes to."""
    _check(state, body)
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    prompt, ids = _prompt(state, body, uses_tools)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = state.max_tokens(asked, body.min_tokens, None, len(ids), "messages")
    state.check_amount(1, body.num_choices)
    inside = state.reasons and begins_inside(prompt)
    forms, param = _forms(state, body, uses_tools)
    sampling = state.sampling(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    choices, generations = [], []
    for index in range(body.num_choices):
        choices.append(_Choice(state, body, index, uses_tools, inside))
        generations.append(
            Generation(
                prompt=ids,
                max_tokens=max_tokens,
                end_ids=state.end_ids(body),
                sampling=ServerState.of_choice(sampling, index),
                priority=body.priority or 0,
            )
        )
    head = {"id": new_id("chatcmpl"), "created": now(), "model": name}
    constraint = None
    if forms:
        constraint = Constraint(forms=tuple(forms), param=param, reasoning=state.reasons, inside=inside)
    return Job(body, head, len(ids), choices, generations, constraint)


def _check(state: ServerState, body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true only", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream: true only", "stream_options")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(body, name) == 0:
            raise invalid(f"{name} is 0; a chat has an answer of at least 1 token", name)
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    known = [tool.function.name for tool in body.tools or ()]
    if len(set(known)) < len(known):
        raise invalid("tools: two functions have the same name", "tools")
    if body.tool_choice not in (None, "none") and not known:
        raise invalid("tool_choice is given, but no tools", "tool_choice")
    if named is not None and named not in known:
        raise invalid(f"tool_choice names {named[:64]!r}, which is not among tools", "tool_choice")
    if known and body.tool_choice != "none" and state.tools is None:
        message = "the model's chat template knows no tool calls in a format that this server reads"
        raise invalid(f"{message}; a server started with --tool-call-parser reads one", "tools")


def _prompt(state: ServerState, body: ChatRequest, uses_tools: bool) -> tuple[str, tuple[int, ...]]:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = render_chat(
        state.tokenizer,
        body.messages,
        tools=body.tools or () if uses_tools else (),
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        arguments_as_text=state.tools is not None and state.tools.arguments_as_text,
    )
    try:
        ids = tuple(state.tokenizer.encode(text, add_special_tokens=False))
    except ConfigError as error:
        raise refused(error, "messages") from error
    if not ids:
        raise invalid("the chat template made an empty prompt of these messages", "messages")
    return text, ids


def _forms(state: ServerState, body: ChatRequest, uses_tools: bool) -> tuple[list[Form], str]:
    """What the answer has to be one of, and the field that says so; empty if it may be anything."""
    asked = asked_form(body)
    calls = None
    if uses_tools and (asked is not None or body.tool_choice not in (None, "auto")):
        assert state.tools is not None and state.guides is not None, "checked: a format needs a tokenizer"
        tools = [tool.function for tool in body.tools or ()]
        if isinstance(body.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool.name == body.tool_choice.function.name]
        functions = [(tool.name, tool.parameters or {"type": "object"}) for tool in tools]
        many = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
        calls = Form("calls", state.tools.grammar(functions, state.guides.literal, many))
    if body.tool_choice not in (None, "auto", "none"):
        if asked is not None:
            raise invalid(f"{asked[1]} and tool_choice both say what the answer is; leave one out", asked[1])
        if body.min_tokens:
            raise invalid("min_tokens does not go with a tool_choice that decides where the text ends", "min_tokens")
        return [calls] if calls is not None else [], "tools"
    forms = [asked[0]] if asked is not None else []
    return [*forms, *([calls] if calls is not None else [])], asked[1] if asked is not None else "tools"


class _Choice:
    """One message on its way."""

    def __init__(
        self,
        state: ServerState,
        body: ChatRequest,
        index: int,
        uses_tools: bool,
        inside: bool,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.count = Count()
        self._tokenizer = state.tokenizer
        self.guide: GrammarGuide | None = None
        self._text = GeneratedText(
            state.tokenizer,
            stop=body.stops,
            end_ids=state.end_ids(body),
            skip_special_tokens=body.skip_special_tokens is not False,
            spelled_out=state.spelled_out,
        )
        self._parser = OutputParser(
            reasoning=ReasoningSplit(inside=inside) if state.reasons else None,
            tools=state.tools.new_parser() if uses_tools and state.tools is not None else None,
            max_calls=1 if body.parallel_tool_calls is False else None,
        )
        self._has_calls = False
        self._wants_logprobs = bool(body.logprobs)
        self._events: list[Event] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, update: Update) -> bool:
        """Take an update in; whether a stop string has ended the text, so that nobody wants more."""
        if self.finish_reason is not None:
            return False  # came before the backend knew
        self.count.cached = max(self.count.cached, update.num_cached_prompt)
        for place, token in enumerate(update.token_ids):
            self.count.generated += 1
            self.count.reasoning += self._parser.is_reasoning
            if self._wants_logprobs:
                self._logprobs.append(chat_logprob(self._tokenizer, token, update.logprobs[place]))
            if text := self._text.push(token):
                self._add(self._parser.push(text))
            if self._text.stopped:
                self._end("stop")
                return not update.finish_reason
        if update.finish_reason:
            self._end(update.finish_reason)
        return False

    def _end(self, reason: str) -> None:
        if self.guide is not None and self.guide.problem:
            raise invalid(f"the text had to end before its form was complete: {self.guide.problem}")
        if text := self._text.finish():
            self._add(self._parser.push(text))
        self._add(self._parser.finish())
        self.finish_reason = "tool_calls" if self._has_calls and reason == "stop" else reason

    def _add(self, events: list[Event]) -> None:
        self._has_calls = self._has_calls or any(isinstance(event, ToolCall) for event in events)
        self._events = joined([*self._events, *events])

    def take_events(self) -> tuple[list[Event], list[dict[str, Any]]]:
        """What is new since the last time, and the log-probabilities of its tokens."""
        events, self._events = self._events, []
        logprobs, self._logprobs = self._logprobs, []
        return events, logprobs


_Job = Job[ChatRequest, _Choice]


async def _stream(job: _Job, running: Running) -> AsyncGenerator[dict[str, Any], None]:
    head = {**job.head, "object": "chat.completion.chunk"}
    no_usage = {"usage": None} if job.body.wants_usage else {}

    def chunk(choice: _Choice, delta: dict[str, Any], logprobs: list[dict[str, Any]], finish: str | None) -> Any:
        scores = {"content": logprobs} if logprobs else None
        entry = {"index": choice.index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        return {**head, "choices": [entry], **no_usage}

    for choice in job.choices:
        yield chunk(choice, {"role": "assistant", "content": ""}, [], None)
    async with aclosing(job.updates(running)) as updates:
        async for choices in updates:
            for choice in choices:
                events, logprobs = choice.take_events()
                for event in events:
                    yield chunk(choice, _delta(event), logprobs, None)
                    logprobs = []
                if logprobs or choice.finish_reason is not None:
                    yield chunk(choice, {}, logprobs, choice.finish_reason)
    if job.body.wants_usage:
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


async def _whole(job: _Job, running: Running) -> Response:
    events: list[list[Event]] = [[] for _ in job.choices]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in job.choices]
    async with aclosing(job.updates(running)) as updates:
        async for choices in updates:
            for choice in choices:
                new, scores = choice.take_events()
                events[choice.index] += new
                logprobs[choice.index] += scores
    entries = [
        {
            "index": choice.index,
            "message": _message(events[choice.index]),
            "logprobs": {"content": logprobs[choice.index]} if job.body.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in job.choices
    ]
    return JsonAnswer({**job.head, "object": "chat.completion", "choices": entries, "usage": job.usage})


def _message(events: list[Event]) -> dict[str, Any]:
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCall):
            function = {"name": event.name, "arguments": ""}
            calls.append({"id": new_id("call"), "type": "function", "function": function})
        elif isinstance(event, Arguments):
            calls[event.index]["function"]["arguments"] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message
