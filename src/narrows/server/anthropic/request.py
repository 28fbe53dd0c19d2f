"""The body of ``/v1/messages``, and its translation to a chat request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from narrows.server.http.errors import invalid, required
from narrows.server.schema.chat import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatMessage,
    ChatRequest,
    Function,
    FunctionName,
    History,
    Tool,
    ToolChoice,
    ToolName,
)
from narrows.server.schema.common import (
    MAX_STOPS,
    AtMost,
    GenerationFields,
    JsonObject,
    JsonSchemaFormat,
    OneOf,
    ResponseFormat,
    StopString,
    StrictModel,
    Text,
    Word,
)

__all__ = [
    "CHAT_NAMES",
    "Block",
    "CountRequest",
    "MessagesRequest",
    "MessagesTool",
    "MessagesToolChoice",
    "PastMessage",
    "ResultBlock",
    "TextBlock",
    "chat_of",
]

MAX_BLOCKS = 1_000


def _client_tool(kind: Any) -> Any:
    """A tool's ``type`` unchanged, if its name, description and schema define it.

    Raises:
        PydanticCustomError: it is a tool that Anthropic runs, or has trained its models for.
    """
    if not isinstance(kind, str) or kind == "custom":
        return kind
    raise PydanticCustomError(
        "tool_kind",
        "a tool of type {kind} is Anthropic's own, and this server knows none of them; "
        "describe what your program can do with name, description and input_schema",
        {"kind": repr(kind[:64])},
    )


class TextBlock(StrictModel):
    """Text of a system prompt."""

    type: Literal["text"]
    text: Text


class ResultBlock(StrictModel):
    """A part of what a tool returned; this server reads text."""

    type: Word
    text: Text | None = None


class Block(StrictModel):
    """A part of a message: text, a thought, the use of a tool, or its result."""

    type: Word
    text: Text | None = None
    thinking: Text | None = None
    id: Word | None = None
    name: Word | None = None
    input: JsonObject | None = None
    tool_use_id: Word | None = None
    content: (
        Annotated[
            str | list[ResultBlock],
            OneOf({"a text": Text, "a list": Annotated[list[ResultBlock], AtMost(MAX_BLOCKS, "parts of a result")]}),
        ]
        | None
    ) = None


class PastMessage(StrictModel):
    """One message; if the last is the assistant's, the answer continues its text."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | list[Block],
        OneOf({"a text": Text, "a list": Annotated[list[Block], AtMost(MAX_BLOCKS, "blocks of a message")]}),
    ]


class MessagesTool(StrictModel):
    """A tool that the client runs; ``input_schema`` is a JSON schema of its arguments."""

    type: Annotated[Literal["custom"], BeforeValidator(_client_tool)] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None


class MessagesToolChoice(StrictModel):
    """Whether a tool is used: if the model wants to, any one, the one of that name, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: Word | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictModel):
    """Whether the model thinks first: a variable of the chat template. ``budget_tokens`` is not kept to."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1, lt=2**31)


class OutputFormat(StrictModel):
    """A JSON schema that the text has to fulfil."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(StrictModel):
    """``effort`` is a variable of the chat template."""

    effort: Word | None = None
    format: OutputFormat | None = None


class CountRequest(GenerationFields):
    """A conversation, as the model would read it."""

    messages: Annotated[list[PastMessage], AtMost(MAX_MESSAGES, "messages", least=1)]
    system: (
        Annotated[
            str | list[TextBlock],
            OneOf({"a text": Text, "a list": Annotated[list[TextBlock], AtMost(MAX_BLOCKS, "blocks of a prompt")]}),
        ]
        | None
    ) = None
    tools: Annotated[list[MessagesTool], AtMost(MAX_TOOLS, "tools")] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: Annotated[list[StopString], AtMost(MAX_STOPS, "stops")] | None = None
    chat_template_kwargs: JsonObject | None = Field(default=None, description="variables of the chat template")
    container: Any = Field(default=None, description="not supported; must be null")
    mcp_servers: Any = Field(default=None, description="not supported; must be null or empty")


class MessagesRequest(CountRequest):
    """A conversation to continue by at most ``max_tokens``, or to the end of the context."""

    max_tokens: int = Field(ge=1, lt=2**31)


CHAT_NAMES = {
    "continue_final_message": "messages",
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
}
"""Fields of chats, and their names here."""

_ELSEWHERE = {
    "n": "an answer of this API is one message; leave it out",
    "stop": "this API has stop_sequences for it",
    "response_format": "this API has output_config.format for it",
}
"""Fields of the other routes that have no meaning here."""

_UNSUPPORTED = {
    "container": "this server runs no tools; leave it out",
    "mcp_servers": "this server calls no others; offer what they can do as tools that your program runs",
}


def chat_of(body: CountRequest) -> ChatRequest:
    """The conversation to continue.

    Raises:
        ApiError: 400, naming an unsupported field.
    """
    _check(body)
    shared = {name: getattr(body, name) for name in GenerationFields.model_fields if name in body.model_fields_set}
    choice, config = body.tool_choice, body.output_config
    messages = _messages(body)
    last = messages[-1]
    fields = {
        "messages": messages,
        "continue_final_message": True if last.role == "assistant" and last.content and not last.tool_calls else None,
        "stop": list(body.stop_sequences) if body.stop_sequences else None,
        "response_format": _form(config.format.schema_) if config is not None and config.format is not None else None,
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _choice(choice) if choice is not None else None,
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "reasoning_effort": config.effort if config is not None else None,
        "chat_template_kwargs": _variables(body),
    }
    return ChatRequest(**shared | fields)


def _check(body: CountRequest) -> None:
    for name, why in _ELSEWHERE.items():
        if getattr(body, name) not in (None, 1):
            raise invalid(f"{name}: {why}", name)
    for name, why in _UNSUPPORTED.items():
        if getattr(body, name) not in (None, []):
            raise invalid(f"{name}: {why}", name)
    budget = body.thinking.budget_tokens if body.thinking is not None else None
    if budget is not None and body.max_tokens is not None and budget >= body.max_tokens:
        message = f"thinking.budget_tokens is {budget}; it must be less than max_tokens, which is {body.max_tokens}"
        raise invalid(message, "thinking.budget_tokens")


def _variables(body: CountRequest) -> dict[str, Any] | None:
    """Variables of the chat template: ``thinking`` under the names that templates have for it."""
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        for name in ("enable_thinking", "thinking"):
            variables.setdefault(name, body.thinking.type != "disabled")
    return variables or None


def _form(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema))


def _tool(tool: MessagesTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(type="function", function=function)


def _choice(tool_choice: MessagesToolChoice) -> Any:
    if tool_choice.type != "tool":
        return "required" if tool_choice.type == "any" else tool_choice.type
    if tool_choice.name is None:
        raise invalid("tool_choice.name is missing: the tool to use", "tool_choice.name")
    return ToolChoice(type="function", function=FunctionName(name=tool_choice.name))


def _messages(body: CountRequest) -> list[ChatMessage]:
    """Texts that follow each other and are the same speaker's are one message, as that API has it."""
    history = History()
    system = body.system if body.system is None or isinstance(body.system, str) else _lines(body.system)
    if system:
        history.say("system", system)
    for (role, is_text), pieces in groupby(
        _pieces(body.messages), key=lambda piece: (piece[0], piece[1].type == "text")
    ):
        blocks = [(block, where) for _, block, where in pieces]
        if is_text:
            texts = [required(block.text, f"{where}.text") for block, where in blocks]
            history.say(role, ("" if role == "assistant" else "\n").join(texts))
        else:
            for block, where in blocks:
                _add(history, block, where)
    if not history.messages:
        raise invalid("messages: there is no text in them", "messages")
    return history.messages


def _pieces(messages: Sequence[PastMessage]) -> Iterator[tuple[str, Block, str]]:
    """Whose it is, the block, and its path in the body."""
    for at, message in enumerate(messages):
        if isinstance(message.content, str):
            yield message.role, Block(type="text", text=message.content), f"messages.{at}.content"
        else:
            for index, block in enumerate(message.content):
                yield message.role, block, f"messages.{at}.content.{index}"


def _add(history: History, block: Block, where: str) -> None:
    if block.type == "thinking":
        history.think(required(block.thinking, f"{where}.thinking"))
    elif block.type == "tool_use":
        number, name = required(block.id, f"{where}.id"), required(block.name, f"{where}.name")
        history.call(number, name, json.dumps(block.input or {}, ensure_ascii=False))
    elif block.type == "tool_result":
        history.result(required(block.tool_use_id, f"{where}.tool_use_id"), _result(block, where))
    elif block.type != "redacted_thinking":  # another server's encrypted thought
        known = "text, thinking, tool_use and tool_result"
        raise invalid(f"{where}.type: a block of type {block.type[:64]!r}; this server reads {known}", f"{where}.type")


def _result(block: Block, where: str) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    for at, part in enumerate(block.content):
        if part.type != "text" or part.text is None:
            here = f"{where}.content.{at}"
            raise invalid(f"{here}: a part of type {part.type[:64]!r}; this server accepts text parts only", here)
    return _lines(block.content)


def _lines(blocks: Iterable[TextBlock | ResultBlock]) -> str:
    """Each block is a paragraph."""
    return "\n".join(block.text or "" for block in blocks)
