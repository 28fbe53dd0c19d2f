"""Bodies of ``/tokenize`` and ``/detokenize``, and their answers. Knows shapes only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from narrows.server.schema.chat import ChatMessage, Tool
from narrows.server.schema.common import Body, TokenId

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized"]


class TokenizeRequest(Body):
    """A text, or a conversation, which goes through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(default=None, description="of a prompt; true if absent")
    add_generation_prompt: bool | None = Field(default=None, description="of messages; true if absent")
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Tokenized(Body):
    """Ids, how many, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Ids to text, special tokens spelled out."""

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(Body):
    """The text."""

    prompt: str
