"""Body of ``/v1/chat/completions``. Knows shapes and ranges; decides nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from narrows.server.schema.common import Body, GenerationFields, TopLogprobs

__all__ = ["MAX_TOOLS", "ChatMessage", "ChatRequest", "ContentPart", "Function", "Tool", "ToolChoice", "function_kind"]

MAX_TOOLS = 512


def function_kind(kind: Any) -> Any:
    """A tool's ``type`` as it is, if this server can offer such a tool to the model.

    Raises:
        PydanticCustomError: it is a custom tool, or one that the server would have to run.
    """
    if not isinstance(kind, str) or kind == "function":
        return kind
    if kind == "custom":
        raise PydanticCustomError(
            "tool_kind",
            "a custom tool takes free text, and this server reads calls with JSON arguments only; "
            "describe it as a function whose parameters have one string",
        )
    raise PydanticCustomError(
        "tool_kind",
        "a tool of type {kind} is run by the server that offers it, and this server runs none; "
        "describe what your program can do as functions",
        {"kind": repr(kind[:64])},
    )


FunctionKind = Annotated[Literal["function"], BeforeValidator(function_kind)]


class ContentPart(Body):
    """A part of a message; this server reads text. ``refusal`` and ``thinking`` are parts of past answers."""

    type: str = Field(max_length=64)
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None


class ChatMessage(Body):
    """One message. Further fields are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: str = Field(max_length=64)
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    refusal: str | None = Field(default=None, description="of a past answer without content: what it said instead")


class Function(Body):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: FunctionKind
    function: Function


class FunctionName(Body):
    """A function by name."""

    name: str = Field(max_length=128)


class AllowedTool(Body):
    """A tool by its kind and name."""

    type: FunctionKind
    function: FunctionName


class AllowedTools(Body):
    """Those of ``tools`` that may be called now: if the model wants to, or one at least."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(Body):
    """The one function that has to be called, of type ``function``; or a choice of them, of type ``allowed_tools``."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(GenerationFields):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, description="a variable of the chat template")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(default=None, description="whether the answer's beginning is written")
