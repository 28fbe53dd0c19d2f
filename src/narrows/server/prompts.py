"""A chat's messages to the prompt: what the template expects, and what this server cannot read. Knows fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrows.errors import ConfigError
from narrows.server.errors import invalid, refused
from narrows.server.json_body import JsonLimits, read_json
from narrows.server.reading import Reading
from narrows.server.schema.chat import ChatMessage, ContentPart, Tool
from narrows.server.schema.common import GenerationFields
from narrows.text import Tokenizer

__all__ = ["render_chat", "truncated"]

_OPEN_END = "\ue000the text goes on here\ue000 "
"""Stands at the end of the message that goes on while the template is rendered; its last space tells of trimming."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    variables: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    arguments_as_text: bool = False,
) -> str:
    """The prompt's text. ``arguments_as_text``: the template wants arguments of past calls as JSON text.

    ``continue_final_message``: it ends where the last message, an assistant's, does; nothing closes it.

    Raises:
        ApiError: 400, naming the message that cannot be read; or the template's own refusal.
    """
    plain = [_plain(message, at, arguments_as_text) for at, message in enumerate(messages)]
    if continue_final_message:
        _leave_open(plain)
    try:
        text = tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
            variables=variables,
        )
    except ConfigError as error:
        raise refused(error, "messages") from error
    return _cut_open(text) if continue_final_message else text


def truncated(reading: Reading, body: GenerationFields, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
    """What ``truncate_prompt_tokens`` leaves of a prompt; -1: as many tokens as there is room for beside the answer.

    Raises:
        ApiError: 400, nothing would be left.
    """
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == -1:
        keep = reading.model.max_context - max(body.most_tokens or 1, 1)
    if keep < 1:
        raise invalid(f"{param}: no token would be left of the prompt", "truncate_prompt_tokens")
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]


def _leave_open(messages: list[dict[str, Any]]) -> None:
    """Mark where the last message ends."""
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not last["content"]:
        message = "the last message must be the assistant's, with text and without tool calls"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    last["content"] += _OPEN_END


def _cut_open(text: str) -> str:
    """The text up to the mark."""
    at = text.rfind(_OPEN_END.rstrip())
    if at < 0:
        message = "the chat template does not write the last message as it is, so it cannot go on"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    trims = not text.startswith(_OPEN_END, at)  # then it would have trimmed the message itself, too
    return text[:at].rstrip() if trims else text[:at]


_MUST_SAY = frozenset({"system", "developer", "user", "tool"})
"""Roles whose messages are nothing without content; an assistant's may be calls of tools alone."""


def _plain(message: ChatMessage, at: int, arguments_as_text: bool) -> dict[str, Any]:
    values = message.model_dump(exclude_none=True, exclude={"refusal"})
    if message.role == "developer":
        values["role"] = "system"
    if isinstance(message.content, list):
        texts = [_text(part, f"messages.{at}.content.{place}") for place, part in enumerate(message.content)]
        values["content"] = "".join(texts)
        if thoughts := "".join(part.thinking or "" for part in message.content if part.type == "thinking"):
            values.setdefault("reasoning_content", thoughts)
    elif message.content is None and message.role == "assistant" and message.refusal:
        values["content"] = message.refusal
    elif message.content is None:
        if message.role in _MUST_SAY:
            where = f"messages.{at}.content"
            raise invalid(f"{where}: a message of role {message.role!r} needs content", where)
        values["content"] = ""
    if message.tool_calls and not arguments_as_text:
        values["tool_calls"] = [
            _with_object(call, f"messages.{at}.tool_calls.{place}") for place, call in enumerate(message.tool_calls)
        ]
    return values


def _text(part: ContentPart, where: str) -> str:
    """What a part says in the conversation; a past thought is no text of it.

    Raises:
        ApiError: 400, a part that is not text.
    """
    said = part.refusal if part.type == "refusal" else part.text
    if part.type == "thinking" and part.thinking is not None:
        return ""
    if part.type not in ("text", "input_text", "output_text", "refusal") or said is None:
        raise invalid(f"{where}: a part of type {part.type[:40]!r}; this server reads text parts only", where)
    return said


def _with_object(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The call with its arguments as an object, where they are the JSON text of one.

    Raises:
        ApiError: 400, they hold or nest more than a body may.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = read_json(function["arguments"], JsonLimits(), f"{where}: the text of arguments")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
