"""``/tokenize`` and ``/detokenize``. Knows fields and the tokenizer."""

from __future__ import annotations

from typing import Any

from narrows.server.answers import to_json
from narrows.server.errors import invalid
from narrows.server.prompts import render_chat
from narrows.server.reading import Reading
from narrows.server.schema.tokens import DetokenizeRequest, TokenizeRequest

__all__ = ["detokenize", "tokenize"]


def tokenize(reading: Reading, body: TokenizeRequest) -> bytes:
    """The ids of a prompt or of messages, as :class:`~narrows.server.schema.tokens.Tokenized`.

    Raises:
        ApiError: neither or both are given, or they cannot be encoded.
    """
    reading.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    text, special = body.prompt or "", body.add_special_tokens is not False
    if body.messages is not None:
        text = render_chat(
            reading.tokenizer,
            body.messages,
            tools=body.tools or (),
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            arguments_as_text=reading.tools is not None and reading.tools.arguments_as_text,
        )
        special = False
    ids = reading.encode(text, "prompt" if body.messages is None else "messages", add_special_tokens=special)
    out: dict[str, Any] = {"count": len(ids), "max_model_len": reading.model.max_context, "tokens": ids}
    if body.return_token_strs:
        out["token_strs"] = [reading.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return to_json(out)


def detokenize(reading: Reading, body: DetokenizeRequest) -> bytes:
    """The text of ids, special tokens spelled out.

    Raises:
        ApiError: an id that the model does not have.
    """
    reading.check_model(body.model)
    if (largest := max(body.tokens, default=0)) >= reading.model.vocab_size:
        message = f"token id {largest} is outside the model's vocabulary of {reading.model.vocab_size}"
        raise invalid(f"tokens: {message}", "tokens")
    return to_json({"prompt": reading.tokenizer.decode(body.tokens, skip_special_tokens=False)})
