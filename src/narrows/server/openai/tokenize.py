"""``/tokenize`` and ``/detokenize``: text or messages to token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from narrows.server.conversation import render_chat
from narrows.server.http.errors import invalid
from narrows.server.http.json_io import to_json
from narrows.server.request import RequestReader
from narrows.server.schema.chat import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool
from narrows.server.schema.common import MAX_IDS, AtMost, Body, JsonObject, Name, Text, TokenId

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized", "detokenize", "tokenize"]


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


def tokenize(reader: RequestReader, body: TokenizeRequest) -> bytes:
    """The ids of a prompt or of messages, as :class:`~narrows.server.openai.tokenize.Tokenized`.

    Raises:
        ApiError: neither or both are given, or they cannot be encoded.
    """
    reader.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    text, special = body.prompt or "", body.add_special_tokens is not False
    if body.messages is not None:
        text = render_chat(
            reader.tokenizer,
            body.messages,
            tools=body.tools or (),
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            arguments_as_text=reader.tools is not None and reader.tools.arguments_as_text,
        )
        special = False
    ids = reader.encode(text, "prompt" if body.messages is None else "messages", add_special_tokens=special)
    out: dict[str, Any] = {"count": len(ids), "max_model_len": reader.model.max_context, "tokens": ids}
    if body.return_token_strs:
        out["token_strs"] = [reader.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return to_json(out)


def detokenize(reader: RequestReader, body: DetokenizeRequest) -> bytes:
    """The text of ids, special tokens spelled out.

    Raises:
        ApiError: an id that the model does not have.
    """
    reader.check_model(body.model)
    if (largest := max(body.tokens, default=0)) >= reader.model.vocab_size:
        message = f"token id {largest} is outside the model's vocabulary of {reader.model.vocab_size}"
        raise invalid(f"tokens: {message}", "tokens")
    return to_json({"prompt": reader.tokenizer.decode(body.tokens, skip_special_tokens=False)})
