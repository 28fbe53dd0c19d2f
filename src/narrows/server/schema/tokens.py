"""Bodies of ``/tokenize`` and ``/detokenize``, and their answers. Knows shapes only."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from narrows.server.schema.chat import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool
from narrows.server.schema.common import MAX_IDS, Body, Name, TokenId
from narrows.server.schema.limits import AtMost, JsonObject, Text

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized"]


class TokenizeRequest(Body):
    """A text, or a conversation, which goes through the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES, "messages", least=1)] | None = None
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS, "tools")] | None = None
    add_special_tokens: bool | None = Field(default=None, description="of a prompt; true if absent")
    add_generation_prompt: bool | None = Field(default=None, description="of messages; true if absent")
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class Tokenized(Body):
    """Ids, how many, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Ids to text, special tokens spelled out."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], AtMost(MAX_IDS, "token ids")]


class Detokenized(Body):
    """The text."""

    prompt: str
