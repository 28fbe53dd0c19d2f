"""Answers as the OpenAPI document publishes them; the routes build them as plain dictionaries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from narrows.server.schema.common import StrictModel

__all__ = [
    "ChatCompletion",
    "Completion",
    "ErrorAnswer",
    "HealthAnswer",
    "MessageAnswer",
    "MessageErrorAnswer",
    "MessageTokens",
    "ModelCard",
    "ModelList",
    "ResponseAnswer",
    "ServerInfo",
    "StartProfileRequest",
    "TraceStarted",
    "TraceWritten",
]


class ErrorDetail(BaseModel):
    """The error: ``param`` names the field, if a field caused it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class TokensOfPrompt(BaseModel):
    cached_tokens: int


class TokensOfCompletion(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of the prompts, each counted once, and of all that was generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensOfPrompt
    completion_tokens_details: TokensOfCompletion


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """Answer of ``/v1/chat/completions`` without ``stream``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """``text_offset``: where in the text the token begins. The first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answer of ``/v1/completions`` without ``stream``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ResponsePart(BaseModel):
    """Text of an item."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[TokenLogprob] | None = None


class ResponseItem(BaseModel):
    """A message, a thought or a call of a function; fields by its type."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[ResponsePart] | None = None
    summary: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class TokensOfInput(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of the conversation and of the generated text."""

    input_tokens: int
    input_tokens_details: TokensOfInput
    output_tokens: int
    output_tokens_details: TokensOfCompletion
    total_tokens: int


class ResponseAnswer(BaseModel):
    """Answer of ``/v1/responses`` without ``stream``: items, and the request with defaults filled in."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    model: str
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    store: Literal[False]
    error: None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None


class MessageBlock(BaseModel):
    """Text, a thought or the use of a tool; fields by its type."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(BaseModel):
    """Tokens of the prompt that were not cached, those that were, and those of the message."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(BaseModel):
    """Answer of ``/v1/messages`` without ``stream``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokens(BaseModel):
    """Answer of ``/v1/messages/count_tokens``."""

    input_tokens: int


class MessageErrorDetail(BaseModel):
    """The error; the message names the field, if a field caused it."""

    type: str
    message: str


class MessageErrorAnswer(BaseModel):
    """Every answer below ``/v1/messages`` that is not a success."""

    type: Literal["error"]
    error: MessageErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class HealthAnswer(BaseModel):
    """``status``: ``ok``. Anything else is an error with status 503."""

    status: Literal["ok"]
    num_restarts: int


class ServerInfo(BaseModel):
    """The backend's description of itself, and the server's own options."""

    version: str
    models: list[str]
    max_model_len: int
    server: dict[str, Any]
    backend: dict[str, Any]


class StartProfileRequest(StrictModel):
    """Most steps of the trace; ``num_steps`` is SGLang's name. Absent: ``--trace-steps``."""

    steps: int | None = Field(default=None, ge=1, le=100_000)
    num_steps: int | None = Field(default=None, ge=1, le=100_000)


class TraceStarted(BaseModel):
    """Where the trace will be, and how many steps it may hold."""

    file: str
    steps: int


class TraceWritten(BaseModel):
    """What was written."""

    file: str
    steps: int
    events: int
