"""The body of ``/v1/responses``, and its translation to a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from narrows.server.http.errors import invalid, required
from narrows.server.schema.chat import (
    MAX_PARTS,
    MAX_TOOLS,
    AllowedTool,
    AllowedTools,
    ChatRequest,
    Function,
    FunctionKind,
    FunctionName,
    History,
    Tool,
    ToolChoice,
    ToolName,
)
from narrows.server.schema.common import (
    AtMost,
    GenerationFields,
    JsonObject,
    JsonSchemaFormat,
    OneOf,
    ResponseFormat,
    StrictModel,
    Text,
    TopLogprobs,
    Word,
)

__all__ = [
    "CHAT_NAMES",
    "InputItem",
    "InputPart",
    "ResponsesRequest",
    "ResponsesTool",
    "ResponsesToolChoice",
    "TextFormat",
    "chat_of",
]

MAX_ITEMS = 10_000

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, AtMost(512, "characters of a value")]],
    AtMost(16, "entries"),
]


class InputPart(StrictModel):
    """A part of a message or of a function's output; this server reads text."""

    type: Word
    text: Text | None = None
    refusal: Text | None = None


Parts = Annotated[list[InputPart], AtMost(MAX_PARTS, "parts")]
TextOrParts = Annotated[str | list[InputPart], OneOf({"a text": Text, "a list": Parts})]


class InputItem(StrictModel):
    """A message, a call of a function, its result, or earlier reasoning."""

    type: Word | None = Field(default=None, description="left out: message")
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: TextOrParts | None = None
    name: Word | None = None
    call_id: Word | None = None
    arguments: Text | None = None
    output: TextOrParts | None = None
    summary: Parts | None = None


class ResponsesTool(StrictModel):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    type: FunctionKind
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class AllowedFunction(StrictModel):
    """A tool by its kind and name."""

    type: FunctionKind
    name: str = Field(max_length=128)


class ResponsesToolChoice(StrictModel):
    """The one function that has to be called, of type ``function``; or a choice of them, of type ``allowed_tools``."""

    type: Literal["function", "allowed_tools"]
    name: Word | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedFunction], AtMost(MAX_TOOLS, "allowed tools", least=1)] | None = None


class TextFormat(StrictModel):
    """The required format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Word | None = None
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictModel):
    """The text's form, and how long-winded it is to be: a variable of the chat template."""

    format: TextFormat | None = None
    verbosity: Word | None = None


class ReasoningConfig(StrictModel):
    """``effort`` is a variable of the chat template. Reasoning is returned whole, so summaries have no effect."""

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
    """A text or a list of items to answer. Nothing is stored: every request must contain the whole conversation."""

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


CHAT_NAMES = {
    "messages": "input",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}
"""Fields of chats, and their names here."""

_ELSEWHERE = {
    "n": "an answer of this API is one text; leave it out",
    "max_tokens": "this API has max_output_tokens for it",
    "response_format": "this API has text.format for it",
}
"""Fields of the other routes that have no meaning here."""

_UNSUPPORTED = {
    "previous_response_id": "this server stores no answers; send the whole conversation as input",
    "conversation": "this server stores no conversations; send the whole of it as input",
    "prompt": "this server stores no prompts; send its text as instructions or input",
    "background": "this server stores no answers to come back for; wait for it, or stream it",
    "moderation": "this server moderates nothing; leave it out",
    "context_management": "this server leaves nothing out of a conversation; send what is to be read",
}

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The conversation to continue.

    Raises:
        ApiError: 400, naming an unsupported field.
    """
    _check(body)
    variables = dict(body.chat_template_kwargs or {})
    if body.text is not None and body.text.verbosity is not None:
        variables.setdefault("verbosity", body.text.verbosity)
    shared = {name: getattr(body, name) for name in GenerationFields.model_fields if name in body.model_fields_set}
    fields = {
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "response_format": _form(body.text.format) if body.text is not None and body.text.format is not None else None,
        "logprobs": body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()),
        "top_logprobs": body.top_logprobs,
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _choice(body.tool_choice) if body.tool_choice is not None else None,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "chat_template_kwargs": variables or None,
    }
    return ChatRequest(**shared | fields)


def _check(body: ResponsesRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream: true only", "stream_options")
    for name, why in _ELSEWHERE.items():
        if getattr(body, name) not in (None, 1):
            raise invalid(f"{name}: {why}", name)
    for name, why in _UNSUPPORTED.items():
        if getattr(body, name) not in (None, False, []):
            raise invalid(f"{name}: {why}", name)


def _form(text_format: TextFormat) -> ResponseFormat:
    if text_format.type != "json_schema":
        return ResponseFormat(type=text_format.type)
    if text_format.schema_ is None:
        raise invalid("text.format.schema is missing", "text.format.schema")
    named = {"name": text_format.name, "strict": text_format.strict, "schema": text_format.schema_}
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat.model_validate(named))


def _tool(tool: Any) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _choice(tool_choice: str | ResponsesToolChoice) -> Any:
    """Chats have the names one level below."""
    if isinstance(tool_choice, str):
        return tool_choice
    if tool_choice.type == "function":
        if tool_choice.name is None:
            raise invalid("tool_choice.name is missing: the function to call", "tool_choice.name")
        return ToolChoice(type="function", function=FunctionName(name=tool_choice.name))
    if tool_choice.mode is None or tool_choice.tools is None:
        missing = "tool_choice.mode" if tool_choice.mode is None else "tool_choice.tools"
        raise invalid(f"{missing} is missing", missing)
    tools = [AllowedTool(type="function", function=FunctionName(name=tool.name)) for tool in tool_choice.tools]
    return ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=tool_choice.mode, tools=tools))


def _messages(body: ResponsesRequest) -> list[Any]:
    history = History()
    if body.instructions:
        history.say("system", body.instructions)
    if isinstance(body.input, str):
        history.say("user", body.input)
    else:
        for at, item in enumerate(body.input):
            _add(history, item, f"input.{at}")
    if not history.messages:
        raise invalid("input: there is no text in it", "input")
    return history.messages


def _add(history: History, item: InputItem, where: str) -> None:
    kind = item.type or "message"
    if kind == "message":
        history.say(required(item.role, f"{where}.role"), _text(item.content, f"{where}.content"))
    elif kind == "reasoning":
        thought = item.content or item.summary
        if thought:
            history.think(_text(thought, f"{where}.{'content' if item.content else 'summary'}"))
    elif kind == "function_call":
        name, arguments = required(item.name, f"{where}.name"), required(item.arguments, f"{where}.arguments")
        history.call(required(item.call_id, f"{where}.call_id"), name, arguments)
    elif kind == "function_call_output":
        history.result(required(item.call_id, f"{where}.call_id"), _text(item.output, f"{where}.output"))
    elif kind == "item_reference":
        raise invalid(f"{where}.type: this server stores no items to refer to; send the item itself", f"{where}.type")
    else:
        known = "message, reasoning, function_call and function_call_output"
        raise invalid(f"{where}.type: an item of type {kind[:64]!r}; this server reads {known}", f"{where}.type")


def _text(content: str | list[InputPart] | None, where: str) -> str:
    if content is None:
        raise invalid(f"{where} is missing", where)
    if isinstance(content, str):
        return content
    return "".join(_text_of_part(part, f"{where}.{at}") for at, part in enumerate(content))


def _text_of_part(part: InputPart, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
    if text is None:
        raise invalid(f"{where}: a part of type {part.type[:64]!r}; this server accepts text parts only", where)
    return text
