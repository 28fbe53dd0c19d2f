"""Answers, as published in the OpenAPI document. The answers themselves are built as plain dictionaries.

Tests hold the two against each other: what the server sends has to validate here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = ["ChatCompletion", "Completion", "ErrorAnswer", "HealthAnswer", "ModelCard", "ModelList", "ServerInfo"]


class ErrorDetail(BaseModel):
    """What was wrong: ``param`` names the field, if it was one."""

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
    """``status``: ``ok``. Anything else comes as an error with status 503."""

    status: Literal["ok"]
    num_restarts: int


class ServerInfo(BaseModel):
    """What runs, in the words of the backend; and the server's own options."""

    version: str
    models: list[str]
    max_model_len: int
    server: dict[str, Any]
    backend: dict[str, Any]
