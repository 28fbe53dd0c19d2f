"""A conversation to the generations of its next message: what the APIs of chats, responses and messages share.

Knows fields and ids; not how an API spells its answers.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import partial
from typing import Any

from narrows.server.asked import Asked, Wishes
from narrows.server.errors import invalid
from narrows.server.forms import Constraint, asked_form, closed
from narrows.server.guides import Form, literal
from narrows.server.prompts import render_chat, truncated
from narrows.server.reading import Reading
from narrows.server.reasoning import begins_inside
from narrows.server.respond import Job
from narrows.server.schema.chat import ChatRequest, Function
from narrows.server.tool_use import Calls, ToolUse, tool_use
from narrows.server.turn import Turn
from narrows.text import GeneratedText

__all__ = ["Conversation", "Conversing", "begin_conversation", "conversation_prompt", "read_conversation"]

Conversation = Job[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversing(Asked):
    """What a body comes to. ``inside``: the prompt has opened a thought."""

    calls: Calls
    inside: bool


def read_conversation(reading: Reading, body: ChatRequest, head: dict[str, Any], *, capped: bool = False) -> Conversing:
    """What a body comes to; ``head`` is what every piece of the answer begins with.

    ``capped``: more tokens may be asked for than the context has room for; then it is as many as there is room for.

    Raises:
        ApiError: 400, naming the field.
    """
    use = tool_use(reading, body)
    prompt, ids = _prompt(reading, body, use)
    asked = body.most_tokens
    if capped and asked is not None:
        asked = min(asked, max(1, reading.model.max_context - len(ids)))
    max_tokens = reading.max_tokens(asked, body.min_tokens, None, len(ids), "messages")
    reading.check_amount(1, body.num_choices)
    inside = reading.reasons and begins_inside(prompt)
    forms, param = _forms(reading, body, use)
    if forms and body.allowed_token_ids is not None:
        message = f"allowed_token_ids and {param} both say which tokens may come; leave one out"
        raise invalid(message, "allowed_token_ids")
    constraint = None
    if forms:
        constraint = Constraint(forms=tuple(forms), param=param, reasoning=reading.reasons, inside=inside)
    return Conversing(
        wishes=Wishes.of(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        head=head,
        prompts=(array("I", ids),),
        max_tokens=max_tokens,
        end_ids=reading.end_ids(body),
        sampling=reading.sampling(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        allowed=reading.allowed(body),
        constraint=constraint,
        calls=use.calls(parallel=body.parallel_tool_calls is not False),
        inside=inside,
    )


def begin_conversation(reading: Reading, asked: Conversing) -> Conversation:
    """Its texts, before their first token."""
    wishes, ids = asked.wishes, tuple(asked.prompts[0])
    text = GeneratedText(
        reading.tokenizer,
        stop=wishes.stops,
        keep_stop=wishes.keeps_stop,
        end_ids=asked.end_ids,
        skip_special_tokens=wishes.skips_special,
        spelled_out=reading.spelled_out,
    )
    turns = [Turn(reading, wishes, at, asked.calls, asked.inside, text.another()) for at in range(wishes.num_choices)]
    generations = [asked.generation(ids, at) for at in range(wishes.num_choices)]
    return Job(wishes, asked.head, len(ids), turns, generations, asked.constraint)


def conversation_prompt(reading: Reading, body: ChatRequest) -> tuple[str, tuple[int, ...]]:
    """What the model reads, as text and as tokens.

    Raises:
        ApiError: 400, naming the field.
    """
    return _prompt(reading, body, tool_use(reading, body))


def _prompt(reading: Reading, body: ChatRequest, use: ToolUse) -> tuple[str, tuple[int, ...]]:
    if body.continue_final_message and body.add_generation_prompt:
        message = "the last message goes on, or an answer begins; set add_generation_prompt false"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = render_chat(
        reading.tokenizer,
        body.messages,
        tools=use.tools,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        arguments_as_text=reading.tools is not None and reading.tools.arguments_as_text,
    )
    cut = body.truncate_prompt_tokens is not None
    ids = reading.encode(text, "messages", add_special_tokens=bool(body.add_special_tokens), cut=cut)
    if not ids:
        raise invalid("the chat template made an empty prompt of these messages", "messages")
    return text, truncated(reading, body, ids, "messages")


def _forms(reading: Reading, body: ChatRequest, use: ToolUse) -> tuple[list[Form], str]:
    """What the answer has to be one of, and the field that says so; empty if it may be anything."""
    asked = asked_form(body)
    calls = None
    if use.tools and (asked is not None or use.must):
        assert reading.tools is not None, "checked: a format needs a tokenizer"
        functions = [(tool.function.name, _arguments(tool.function)) for tool in use.tools]
        calls = Form("calls", reading.tools.grammar(functions, partial(literal, reading.tokenizer), use.many))
    if use.must:
        if asked is not None:
            raise invalid(f"{asked[1]} and tool_choice both say what the answer is; leave one out", asked[1])
        if body.min_tokens:
            raise invalid("min_tokens does not go with a tool_choice that decides where the text ends", "min_tokens")
        return [calls] if calls is not None else [], "tools"
    forms = [asked[0]] if asked is not None else []
    return [*forms, *([calls] if calls is not None else [])], asked[1] if asked is not None else "tools"


def _arguments(function: Function) -> dict[str, Any]:
    """The JSON schema of a function's arguments."""
    if not function.parameters:
        return {"type": "object"}
    return closed(function.parameters, "tools") if function.strict else function.parameters
