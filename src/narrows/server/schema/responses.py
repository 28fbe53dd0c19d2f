"""Body of ``/v1/responses``. Knows shapes and ranges; decides nothing.

What makes OpenAI's service keep things (stored answers, conversations, files) is named here only to be refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from narrows.server.schema.chat import MAX_PARTS, MAX_TOOLS, FunctionKind, ToolName
from narrows.server.schema.common import Body, GenerationFields, TopLogprobs, Word
from narrows.server.schema.limits import AtMost, JsonObject, OneOf, Text

__all__ = ["InputItem", "InputPart", "ResponsesRequest", "ResponsesTool", "ResponsesToolChoice", "TextFormat"]

MAX_ITEMS = 10_000

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, AtMost(512, "characters of a value")]],
    AtMost(16, "entries"),
]


class InputPart(Body):
    """A part of a message or of a function's output; this server reads text."""

    type: Word
    text: Text | None = None
    refusal: Text | None = None


Parts = Annotated[list[InputPart], AtMost(MAX_PARTS, "parts")]
TextOrParts = Annotated[str | list[InputPart], OneOf({"a text": Text, "a list": Parts})]


class InputItem(Body):
    """A message, a call of a function, what the function returned, or what the model thought before."""

    type: Word | None = Field(default=None, description="left out: message")
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: TextOrParts | None = None
    name: Word | None = None
    call_id: Word | None = None
    arguments: Text | None = None
    output: TextOrParts | None = None
    summary: Parts | None = None


class ResponsesTool(Body):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    type: FunctionKind
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class AllowedFunction(Body):
    """A tool by its kind and name."""

    type: FunctionKind
    name: str = Field(max_length=128)


class ResponsesToolChoice(Body):
    """The one function that has to be called, of type ``function``; or a choice of them, of type ``allowed_tools``."""

    type: Literal["function", "allowed_tools"]
    name: Word | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedFunction], AtMost(MAX_TOOLS, "allowed tools", least=1)] | None = None


class TextFormat(Body):
    """What the text has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Word | None = None
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """The text's form, and how long-winded it is to be: a variable of the chat template."""

    format: TextFormat | None = None
    verbosity: Word | None = None


class ReasoningConfig(Body):
    """``effort`` is a variable of the chat template. Thoughts come whole, so there is nothing to say of summaries."""

    effort: Word | None = None
    summary: Word | None = None
    generate_summary: Word | None = None


Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponsesRequest(GenerationFields):
    """A text or a list of items to answer. Nothing is stored: every request has to bring the whole conversation."""

    input: Annotated[
        str | list[InputItem],
        OneOf({"a text": Text, "a list": Annotated[list[InputItem], AtMost(MAX_ITEMS, "items", least=1)]}),
    ]
    instructions: Text | None = Field(default=None, description="a system message in front of the input")
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    text: TextConfig | None = None
    tools: Annotated[list[ResponsesTool], AtMost(MAX_TOOLS, "tools")] | None = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | ResponsesToolChoice,
            OneOf({"a text": Literal["none", "auto", "required"], "an object": ResponsesToolChoice}),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[Include], AtMost(32, "things to include")] | None = None
    top_logprobs: TopLogprobs | None = None
    metadata: Metadata | None = Field(default=None, description="comes back with the answer")
    user: Annotated[str, AtMost(512, "characters of a user")] | None = None
    store: bool | None = Field(default=None, description="whatever it says, nothing is stored; the answer says false")
    truncation: Literal["auto", "disabled"] | None = Field(default=None, description="nothing is ever left out")
    chat_template_kwargs: JsonObject | None = Field(default=None, description="variables of the chat template")
    background: bool | None = Field(default=None, description="not supported; must be false")
    previous_response_id: Word | None = Field(default=None, description="not supported; must be null")
    conversation: Any = Field(default=None, description="not supported; must be null")
    prompt: Any = Field(default=None, description="not supported; must be null")
    moderation: Any = Field(default=None, description="not supported; must be null")
    context_management: Any = Field(default=None, description="not supported; must be null or empty")
