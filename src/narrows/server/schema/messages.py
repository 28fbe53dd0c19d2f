"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``, in Anthropic's words. Knows shapes and ranges only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from narrows.server.schema.chat import MAX_MESSAGES, MAX_TOOLS, ToolName
from narrows.server.schema.common import MAX_STOPS, Body, GenerationFields, StopString, Word
from narrows.server.schema.limits import AtMost, JsonObject, OneOf, Text

__all__ = [
    "Block",
    "CountRequest",
    "MessagesRequest",
    "MessagesTool",
    "MessagesToolChoice",
    "PastMessage",
    "ResultBlock",
    "TextBlock",
]

MAX_BLOCKS = 1_000


def _client_tool(kind: Any) -> Any:
    """A tool's ``type`` as it is, if it is one that its name, description and schema say all about.

    Raises:
        PydanticCustomError: it is one of those that Anthropic runs, or has taught its models.
    """
    if not isinstance(kind, str) or kind == "custom":
        return kind
    raise PydanticCustomError(
        "tool_kind",
        "a tool of type {kind} is Anthropic's own, and this server knows none of them; "
        "describe what your program can do with name, description and input_schema",
        {"kind": repr(kind[:64])},
    )


class TextBlock(Body):
    """Text of a system prompt."""

    type: Literal["text"]
    text: Text


class ResultBlock(Body):
    """A part of what a tool returned; this server reads text."""

    type: Word
    text: Text | None = None


class Block(Body):
    """A part of a message: text, a thought, the use of a tool, or what that came to."""

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


class PastMessage(Body):
    """One message; if the last is the assistant's, its text is gone on with."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | list[Block],
        OneOf({"a text": Text, "a list": Annotated[list[Block], AtMost(MAX_BLOCKS, "blocks of a message")]}),
    ]


class MessagesTool(Body):
    """A tool that the client runs; ``input_schema`` is a JSON schema of its arguments."""

    type: Annotated[Literal["custom"], BeforeValidator(_client_tool)] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None


class MessagesToolChoice(Body):
    """Whether a tool is used: if the model wants to, any one, the one of that name, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: Word | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks first: a variable of the chat template. ``budget_tokens`` is not kept to."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1, lt=2**31)


class OutputFormat(Body):
    """A JSON schema that the text has to fulfil."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Body):
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
    """A conversation to go on with; at most ``max_tokens``, or as far as the context reaches."""

    max_tokens: int = Field(ge=1, lt=2**31)
