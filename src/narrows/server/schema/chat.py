"""Body of ``/v1/chat/completions``. Knows shapes and ranges; decides nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from narrows.server.schema.common import Body, GenerationFields, TopLogprobs

__all__ = ["ChatMessage", "ChatRequest", "Function", "NamedTool", "Tool"]


class ContentPart(Body):
    """A part of a message; this server reads text."""

    type: str
    text: str | None = None


class ChatMessage(Body):
    """One message. Further fields are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: str = Field(max_length=64)
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None


class Function(Body):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function by name."""

    name: str


class NamedTool(Body):
    """The one function that has to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationFields):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, description="a variable of the chat template")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(default=None, description="whether the answer's beginning is written")
