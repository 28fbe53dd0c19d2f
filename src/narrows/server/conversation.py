"""A chat request to its prompt and generations: messages, tools, output format. All chat APIs share it."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from narrows.errors import ConfigError
from narrows.server.generation import Job, RunningRequest, respond
from narrows.server.http.errors import ApiError, backend_error, invalid
from narrows.server.http.json_io import JsonLimits, read_json
from narrows.server.http.stream import NamedEvents
from narrows.server.output import ChatOutput
from narrows.server.parsers.events import Event
from narrows.server.parsers.formats import Calls, begins_inside
from narrows.server.request import AnswerOptions, ParsedRequest, RequestReader, truncated
from narrows.server.schema.chat import ChatMessage, ChatRequest, ContentPart, Function, Tool, ToolChoice
from narrows.server.state import ServerState
from narrows.server.structured_output.constraints import Constraint, Form, closed, literal, requested_grammar
from narrows.text import GeneratedText, Tokenizer

__all__ = [
    "ChatJob",
    "EventWriter",
    "ParsedChat",
    "ToolUse",
    "chat_prompt",
    "parse_chat",
    "render_chat",
    "respond_with_events",
    "start_chat",
    "tool_use",
]

ChatJob = Job[ChatOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedChat(ParsedRequest):
    """A parsed chat request. ``inside``: the prompt has opened the reasoning already."""

    calls: Calls
    inside: bool


def parse_chat(reader: RequestReader, body: ChatRequest, head: dict[str, Any], *, capped: bool = False) -> ParsedChat:
    """The parsed request; ``head``: the fields that every chunk of the answer begins with.

    ``capped``: a ``max_tokens`` beyond the context's room is reduced to that room instead of refused.

    Raises:
        ApiError: 400, naming the field.
    """
    use = tool_use(reader, body)
    prompt, ids = _prompt(reader, body, use)
    requested = body.most_tokens
    if capped and requested is not None:
        requested = min(requested, max(1, reader.model.max_context - len(ids)))
    max_tokens = reader.max_tokens(requested, body.min_tokens, None, len(ids), "messages")
    reader.check_amount(1, body.num_choices)
    inside = reader.reasons and begins_inside(prompt)
    forms, param = _forms(reader, body, use)
    if forms and body.allowed_token_ids is not None:
        message = f"allowed_token_ids and {param} both restrict the tokens; send only one"
        raise invalid(message, "allowed_token_ids")
    constraint = None
    if forms:
        constraint = Constraint(forms=tuple(forms), param=param, reasoning=reader.reasons, inside=inside)
    return ParsedChat(
        options=AnswerOptions.of(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        head=head,
        prompts=(array("I", ids),),
        max_tokens=max_tokens,
        end_ids=reader.end_ids(body),
        sampling=reader.sampling(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        allowed=reader.allowed(body),
        constraint=constraint,
        calls=use.calls(parallel=body.parallel_tool_calls is not False),
        inside=inside,
    )


def start_chat(reader: RequestReader, parsed: ParsedChat) -> ChatJob:
    """Its job: outputs and generations before the first token."""
    options, ids = parsed.options, tuple(parsed.prompts[0])
    text = GeneratedText(
        reader.tokenizer,
        stop=options.stops,
        keep_stop=options.keeps_stop,
        end_ids=parsed.end_ids,
        skip_special_tokens=options.skips_special,
        spelled_out=reader.spelled_out,
    )
    turns = [
        ChatOutput(reader, options, at, parsed.calls, parsed.inside, text.another())
        for at in range(options.num_choices)
    ]
    generations = [parsed.generation(ids, at) for at in range(options.num_choices)]
    return Job(options, parsed.head, len(ids), turns, generations, parsed.constraint)


class EventWriter(Protocol):
    """Writes one chat answer as the events of an API's stream; ``answer`` is the whole of it after :meth:`end`."""

    @property
    def answer(self) -> dict[str, Any]:
        """The answer as far as it has come."""
        ...

    def begin(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events before the first token."""
        ...

    def take(self, events: Sequence[Event], logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The new parts as events."""
        ...

    def end(self, job: ChatJob) -> list[dict[str, Any]]:
        """The events after the last token."""
        ...

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a failed stream."""
        ...


async def respond_with_events(
    state: ServerState, request: Request, job: ChatJob, param: str, writer: EventWriter
) -> Response:
    """The answer of an API whose streams are named events: as ``writer`` writes them, or the whole that they make.

    Raises:
        ApiError: it cannot be served.
    """

    async def stream(job: ChatJob, running: RunningRequest) -> AsyncGenerator[dict[str, Any], None]:
        for event in writer.begin(job):
            yield event
        async with aclosing(job.updates(running)) as updates:
            async for outputs in updates:
                for output in outputs:
                    for event in writer.take(*output.take_events()):
                        yield event
        for event in writer.end(job):
            yield event

    async def whole(job: ChatJob, running: RunningRequest) -> dict[str, Any]:
        async with aclosing(stream(job, running)) as events:
            async for _ in events:
                pass
        return writer.answer

    named = NamedEvents(writer.fail)
    return await respond(state, request, job, param, stream=stream, whole=whole, stream_format=named)


def chat_prompt(reader: RequestReader, body: ChatRequest) -> tuple[str, tuple[int, ...]]:
    """The prompt, as text and as token ids.

    Raises:
        ApiError: 400, naming the field.
    """
    return _prompt(reader, body, tool_use(reader, body))


def _prompt(reader: RequestReader, body: ChatRequest, use: ToolUse) -> tuple[str, tuple[int, ...]]:
    if body.continue_final_message and body.add_generation_prompt:
        message = "it excludes add_generation_prompt; set that to false"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = render_chat(
        reader.tokenizer,
        body.messages,
        tools=use.tools,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        arguments_as_text=reader.tools is not None and reader.tools.arguments_as_text,
    )
    cut = body.truncate_prompt_tokens is not None
    ids = reader.encode(text, "messages", add_special_tokens=bool(body.add_special_tokens), cut=cut)
    if not ids:
        raise invalid("the chat template made an empty prompt of these messages", "messages")
    return text, truncated(reader, body, ids, "messages")


def _forms(reader: RequestReader, body: ChatRequest, use: ToolUse) -> tuple[list[Form], str]:
    """The required forms of the answer, and the field that demands them; empty: any text."""
    requested = requested_grammar(body)
    calls = None
    if use.tools and (requested is not None or use.must):
        assert reader.tools is not None, "checked: a format needs a tokenizer"
        functions = [(tool.function.name, _arguments(tool.function)) for tool in use.tools]
        calls = Form("calls", reader.tools.grammar(functions, partial(literal, reader.tokenizer), use.many))
    if use.must:
        if requested is not None:
            raise invalid(
                f"{requested[1]} and tool_choice both set the format of the answer; send only one", requested[1]
            )
        if body.min_tokens:
            raise invalid("min_tokens does not go with a tool_choice that decides where the text ends", "min_tokens")
        return [calls] if calls is not None else [], "tools"
    forms = [requested[0]] if requested is not None else []
    return [*forms, *([calls] if calls is not None else [])], requested[1] if requested is not None else "tools"


def _arguments(function: Function) -> dict[str, Any]:
    """The JSON schema of a function's arguments."""
    if not function.parameters:
        return {"type": "object"}
    return closed(function.parameters, "tools") if function.strict else function.parameters


_OPEN_END = "\ue000the text goes on here\ue000 "
"""Marks the end of the continued message while the template is rendered; its last space reveals trimming."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    variables: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    arguments_as_text: bool = False,
) -> str:
    """The prompt's text. ``arguments_as_text``: the template wants arguments of past calls as JSON text.

    ``continue_final_message``: it ends where the last message, an assistant's, does; nothing closes it.

    Raises:
        ApiError: 400, naming the message that cannot be read; or the template's own refusal.
    """
    plain = [_plain(message, at, arguments_as_text) for at, message in enumerate(messages)]
    if continue_final_message:
        _leave_open(plain)
    try:
        text = tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
            variables=variables,
        )
    except ConfigError as error:
        raise backend_error(error, "messages") from error
    return _cut_open(text) if continue_final_message else text


def _leave_open(messages: list[dict[str, Any]]) -> None:
    """Mark where the last message ends."""
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not last["content"]:
        message = "the last message must be the assistant's, with text and without tool calls"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    last["content"] += _OPEN_END


def _cut_open(text: str) -> str:
    """The text up to the mark."""
    at = text.rfind(_OPEN_END.rstrip())
    if at < 0:
        message = "the chat template changes the last message, so it cannot be continued"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    trims = not text.startswith(_OPEN_END, at)  # then it would have trimmed the message itself, too
    return text[:at].rstrip() if trims else text[:at]


_MUST_SAY = frozenset({"system", "developer", "user", "tool"})
"""Roles whose messages are nothing without content; an assistant's may be calls of tools alone."""


def _plain(message: ChatMessage, at: int, arguments_as_text: bool) -> dict[str, Any]:
    values = message.model_dump(exclude_none=True, exclude={"refusal"})
    if message.role == "developer":
        values["role"] = "system"
    if isinstance(message.content, list):
        texts = [_text(part, f"messages.{at}.content.{index}") for index, part in enumerate(message.content)]
        values["content"] = "".join(texts)
        if thoughts := "".join(part.thinking or "" for part in message.content if part.type == "thinking"):
            values.setdefault("reasoning_content", thoughts)
    elif message.content is None and message.role == "assistant" and message.refusal:
        values["content"] = message.refusal
    elif message.content is None:
        if message.role in _MUST_SAY:
            where = f"messages.{at}.content"
            raise invalid(f"{where}: a message of role {message.role!r} needs content", where)
        values["content"] = ""
    if message.tool_calls and not arguments_as_text:
        values["tool_calls"] = [
            _with_object(call, f"messages.{at}.tool_calls.{index}") for index, call in enumerate(message.tool_calls)
        ]
    return values


def _text(part: ContentPart, where: str) -> str:
    """The text of a part; a past thought has none.

    Raises:
        ApiError: 400, a part that is not text.
    """
    text = part.refusal if part.type == "refusal" else part.text
    if part.type == "thinking" and part.thinking is not None:
        return ""
    if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
        raise invalid(f"{where}: a part of type {part.type[:40]!r}; this server accepts text parts only", where)
    return text


def _with_object(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The call with its arguments as an object, where they are the JSON text of one.

    Raises:
        ApiError: 400, they hold or nest more than a body may.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = read_json(function["arguments"], JsonLimits(), f"{where}: the text of arguments")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """``tools``: those that the model is shown and may call, none if no call is read. ``must``: it has to call one.

    ``many``: it may call several. ``strangers``: a call of another function is handed out too; the client refuses it.
    """

    tools: tuple[Tool, ...] = ()
    must: bool = False
    many: bool = True
    strangers: bool = True

    def calls(self, *, parallel: bool) -> Calls:
        """The formats that are parsed in the model's text."""
        names = None if self.strangers else frozenset(tool.function.name for tool in self.tools)
        return Calls(are_read=bool(self.tools), most=None if parallel else 1, names=names)


def tool_use(reader: RequestReader, body: ChatRequest) -> ToolUse:
    """The meaning of ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        ApiError: 400, they contradict each other, or the model's template has no tools.
    """
    choice = body.tool_choice
    tools = {tool.function.name: tool for tool in body.tools or ()}
    if len(tools) < len(body.tools or ()):
        raise invalid("tools: two functions have the same name", "tools")
    if choice not in (None, "none") and not tools:
        raise invalid("tool_choice is given, but no tools", "tool_choice")
    if not tools or choice == "none":
        return ToolUse()
    if reader.tools is None:
        message = "the model's chat template has no tool-call format that this server can parse"
        raise invalid(f"{message}; start the server with --tool-call-parser", "tools")
    many = body.parallel_tool_calls is not False
    if not isinstance(choice, ToolChoice):
        return ToolUse(tools=tuple(tools.values()), must=choice == "required", many=many)
    return _of_choice(choice, tools, many)


def _of_choice(choice: ToolChoice, tools: dict[str, Tool], many: bool) -> ToolUse:
    names, must = [], True
    if choice.type == "function":
        if choice.function is None:
            raise invalid("tool_choice.function is missing: the name of the function to call", "tool_choice.function")
        names, many = [choice.function.name], False
    else:
        allowed = choice.allowed_tools
        if allowed is None:
            raise invalid("tool_choice.allowed_tools is missing: a mode and tools", "tool_choice.allowed_tools")
        names, must = [tool.function.name for tool in allowed.tools], allowed.mode == "required"
    for name in names:
        if name not in tools:
            raise invalid(f"tool_choice names {name!r}, which is not among tools", "tool_choice")
    return ToolUse(
        tools=tuple(tool for name, tool in tools.items() if name in names), must=must, many=many, strangers=False
    )
