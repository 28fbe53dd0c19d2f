"""``/tokenize`` and ``/detokenize``. Knows fields and the tokenizer."""

from __future__ import annotations

from typing import Any

from narrows.server.errors import invalid
from narrows.server.prompts import render_chat
from narrows.server.schema.tokens import DetokenizeRequest, TokenizeRequest
from narrows.server.state import ServerState

__all__ = ["detokenize", "tokenize"]


def tokenize(state: ServerState, body: TokenizeRequest) -> dict[str, Any]:
    """The ids of a prompt or of messages, as :class:`~narrows.server.schema.tokens.Tokenized`.

    Raises:
        ApiError: neither or both are given, or they cannot be encoded.
    """
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    text, special = body.prompt or "", body.add_special_tokens is not False
    if body.messages is not None:
        text = render_chat(
            state.tokenizer,
            body.messages,
            tools=body.tools or (),
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            arguments_as_text=state.tools is not None and state.tools.arguments_as_text,
        )
        special = False
    ids = state.encode(text, "prompt" if body.messages is None else "messages", add_special_tokens=special)
    out = {"count": len(ids), "max_model_len": state.model.max_context, "tokens": ids}
    if body.return_token_strs:
        out["token_strs"] = [state.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return out


def detokenize(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of ids, special tokens spelled out.

    Raises:
        ApiError: an id that the model does not have.
    """
    state.check_model(body.model)
    if (largest := max(body.tokens, default=0)) >= state.model.vocab_size:
        message = f"token id {largest} is outside the model's vocabulary of {state.model.vocab_size}"
        raise invalid(f"tokens: {message}", "tokens")
    return {"prompt": state.tokenizer.decode(body.tokens, skip_special_tokens=False)}
