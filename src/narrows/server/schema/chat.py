"""The body of ``/v1/chat/completions``, and the past of a conversation as its messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from narrows.server.schema.common import (
    AtMost,
    GenerationFields,
    JsonObject,
    Name,
    OneOf,
    StrictModel,
    Text,
    TopLogprobs,
)

__all__ = [
    "MAX_MESSAGES",
    "MAX_PARTS",
    "MAX_TOOLS",
    "ChatMessage",
    "ChatRequest",
    "ContentPart",
    "Function",
    "FunctionKind",
    "History",
    "Tool",
    "ToolChoice",
    "ToolName",
]

MAX_TOOLS = 512
MAX_MESSAGES = 10_000
MAX_PARTS = 1_000


def _function_kind(kind: Any) -> Any:
    """A tool's ``type`` unchanged, if this server can offer such a tool to the model.

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


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
FunctionKind = Annotated[Literal["function"], BeforeValidator(_function_kind)]


class ContentPart(StrictModel):
    """A part of a message; this server reads text. ``refusal`` and ``thinking`` are parts of past answers."""

    type: str = Field(max_length=64)
    text: Text | None = None
    refusal: Text | None = None
    thinking: Text | None = None


class ChatMessage(StrictModel):
    """One message. Further fields are passed to the chat template unchanged."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: str = Field(max_length=64)
    content: (
        Annotated[
            str | list[ContentPart],
            OneOf({"a text": Text, "a list": Annotated[list[ContentPart], AtMost(MAX_PARTS, "parts of a message")]}),
        ]
        | None
    ) = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[JsonObject], AtMost(MAX_TOOLS, "tool calls of a message")] | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = Field(default=None, description="of a past answer without content: its refusal")


class Function(StrictModel):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; functions are the only kind."""

    type: FunctionKind
    function: Function


class FunctionName(StrictModel):
    """A function by name."""

    name: str = Field(max_length=128)


class AllowedTool(StrictModel):
    """A tool by its kind and name."""

    type: FunctionKind
    function: FunctionName


class AllowedTools(StrictModel):
    """Those of ``tools`` that may be called now: if the model wants to, or one at least."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], AtMost(MAX_TOOLS, "allowed tools", least=1)]


class ToolChoice(StrictModel):
    """The one function that has to be called, of type ``function``; or a choice of them, of type ``allowed_tools``."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(GenerationFields):
    """A conversation to continue."""

    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES, "messages", least=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS, "tools")] | None = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | ToolChoice,
            OneOf({"a text": Literal["none", "auto", "required"], "an object": ToolChoice}),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = Field(default=None, description="a variable of the chat template")
    chat_template_kwargs: JsonObject | None = Field(default=None, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(default=None, description="whether the answer's beginning is written")
    continue_final_message: bool | None = Field(
        default=None, description="the assistant's last message is left open, and the answer is what follows in it"
    )
    add_special_tokens: bool | None = Field(default=None, description="also those that the template does not write")

    @property
    def most_tokens(self) -> int | None:
        """``max_completion_tokens``, or ``max_tokens`` by either name."""
        return super().most_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class History:
    """The messages so far. A thought, a text and calls of the model, in this order, become one message.

    >>> history = History()
    >>> history.say("user", "2 + 2?"), history.think("easy"), history.say("assistant", "4")
    (None, None, None)
    >>> [(message.role, message.reasoning_content, message.content) for message in history.messages]
    [('user', None, '2 + 2?'), ('assistant', 'easy', '4')]
    """

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._thought: str | None = None
        self._text: str | None = None
        self._calls: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[ChatMessage]:
        """All of them."""
        self._end_answer()
        return self._messages

    def think(self, text: str) -> None:
        """Add a thought of the model."""
        if self._text is not None or self._calls:
            self._end_answer()
        self._thought = (self._thought or "") + text

    def say(self, role: str, text: str) -> None:
        """Add a text of ``role``."""
        if role == "assistant":
            if self._text is not None or self._calls:
                self._end_answer()
            self._text = text
        else:
            self._end_answer()
            self._messages.append(ChatMessage(role=role, content=text))

    def call(self, number: str, name: str, arguments: str) -> None:
        """Add a call of a function; ``arguments`` are JSON."""
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": number, "type": "function", "function": function})

    def result(self, number: str, text: str) -> None:
        """Add the result of a call."""
        self._end_answer()
        self._messages.append(ChatMessage(role="tool", tool_call_id=number, content=text))

    def _end_answer(self) -> None:
        if self._thought is None and self._text is None and not self._calls:
            return
        self._messages.append(
            ChatMessage(
                role="assistant",
                content=self._text,
                reasoning_content=self._thought,
                tool_calls=self._calls or None,
            )
        )
        self._thought, self._text, self._calls = None, None, []
