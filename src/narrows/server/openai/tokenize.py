"""``/tokenize`` and ``/detokenize``: text or messages to token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from narrows.server.conversation import render_chat
from narrows.server.http.body import Body
from narrows.server.http.errors import invalid
from narrows.server.http.json_io import JsonAnswer, to_json
from narrows.server.request import RequestReader
from narrows.server.schema.chat import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool
from narrows.server.schema.common import MAX_IDS, AtMost, JsonObject, Name, StrictModel, Text, TokenId

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized", "detokenize", "tokenize"]


class TokenizeRequest(StrictModel):
    """A text, or a conversation, which goes through the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES, "messages", least=1)] | None = None
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS, "tools")] | None = None
    add_special_tokens: bool | None = Field(default=None, description="of a prompt; true if absent")
    add_generation_prompt: bool | None = Field(default=None, description="of messages; true if absent")
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class Tokenized(StrictModel):
    """Ids, how many, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Ids to text, special tokens spelled out."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], AtMost(MAX_IDS, "token ids")]


class Detokenized(StrictModel):
    """The text."""

    prompt: str


async def tokenize(body: Body[TokenizeRequest]) -> Response:
    """Text, or messages through the chat template, to token ids."""
    return JsonAnswer(await body.read(_token_ids))


async def detokenize(body: Body[DetokenizeRequest]) -> Response:
    """Token ids to text, special tokens spelled out."""
    return JsonAnswer(await body.read(_text))


def _token_ids(reader: RequestReader, body: TokenizeRequest) -> bytes:
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


def _text(reader: RequestReader, body: DetokenizeRequest) -> bytes:
    """The text of ids, special tokens spelled out.

    Raises:
        ApiError: an id that the model does not have.
    """
    reader.check_model(body.model)
    reader.check_token_ids(body.tokens, "tokens")
    return to_json({"prompt": reader.tokenizer.decode(body.tokens, skip_special_tokens=False)})
