"""A conversation to the generations of its next message: what the APIs of chats, responses and messages share.

Knows fields and ids; not how an API spells its answers.
"""

from __future__ import annotations

from typing import Any

from narrows.server.backend import Generation
from narrows.server.errors import invalid
from narrows.server.forms import Constraint, asked_form, closed
from narrows.server.guides import Form
from narrows.server.prompts import render_chat, truncated
from narrows.server.reasoning import begins_inside
from narrows.server.respond import Job
from narrows.server.schema.chat import ChatRequest, Function
from narrows.server.state import ServerState
from narrows.server.tool_use import ToolUse, tool_use
from narrows.server.turn import Turn
from narrows.text import GeneratedText

__all__ = ["Conversation", "conversation", "conversation_prompt"]

Conversation = Job[ChatRequest, Turn]


def conversation(state: ServerState, body: ChatRequest, head: dict[str, Any], *, capped: bool = False) -> Conversation:
    """The generations that a body comes to; ``head`` is what every piece of the answer begins with.

    ``capped``: more tokens may be asked for than the context has room for; then it is as many as there is room for.

    Raises:
        ApiError: 400, naming the field.
    """
    use = tool_use(state, body)
    prompt, ids = _prompt(state, body, use)
    asked = body.most_tokens
    if capped and asked is not None:
        asked = min(asked, max(1, state.model.max_context - len(ids)))
    max_tokens = state.max_tokens(asked, body.min_tokens, None, len(ids), "messages")
    state.check_amount(1, body.num_choices)
    inside = state.reasons and begins_inside(prompt)
    forms, param = _forms(state, body, use)
    if forms and body.allowed_token_ids is not None:
        message = f"allowed_token_ids and {param} both say which tokens may come; leave one out"
        raise invalid(message, "allowed_token_ids")
    sampling = state.sampling(body, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    turns, generations = [], []
    allowed, end_ids = state.allowed(body), state.end_ids(body)
    text = GeneratedText(
        state.tokenizer,
        stop=body.stops,
        keep_stop=body.keeps_stop,
        end_ids=end_ids,
        skip_special_tokens=body.skip_special_tokens is not False,
        spelled_out=state.spelled_out,
    )
    for index in range(body.num_choices):
        turns.append(Turn(state, body, index, use, inside, text.another()))
        generations.append(
            Generation(
                prompt=ids,
                max_tokens=max_tokens,
                end_ids=end_ids,
                sampling=ServerState.of_choice(sampling, index),
                priority=body.priority or 0,
                guide=allowed,
            )
        )
    constraint = None
    if forms:
        constraint = Constraint(forms=tuple(forms), param=param, reasoning=state.reasons, inside=inside)
    return Job(body, head, len(ids), turns, generations, constraint)


def conversation_prompt(state: ServerState, body: ChatRequest) -> tuple[str, tuple[int, ...]]:
    """What the model reads, as text and as tokens.

    Raises:
        ApiError: 400, naming the field.
    """
    return _prompt(state, body, tool_use(state, body))


def _prompt(state: ServerState, body: ChatRequest, use: ToolUse) -> tuple[str, tuple[int, ...]]:
    if body.continue_final_message and body.add_generation_prompt:
        message = "the last message goes on, or an answer begins; set add_generation_prompt false"
        raise invalid(f"continue_final_message: {message}", "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = render_chat(
        state.tokenizer,
        body.messages,
        tools=use.tools,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        arguments_as_text=state.tools is not None and state.tools.arguments_as_text,
    )
    cut = body.truncate_prompt_tokens is not None
    ids = state.encode(text, "messages", add_special_tokens=bool(body.add_special_tokens), cut=cut)
    if not ids:
        raise invalid("the chat template made an empty prompt of these messages", "messages")
    return text, truncated(state, body, ids, "messages")


def _forms(state: ServerState, body: ChatRequest, use: ToolUse) -> tuple[list[Form], str]:
    """What the answer has to be one of, and the field that says so; empty if it may be anything."""
    asked = asked_form(body)
    calls = None
    if use.tools and (asked is not None or use.must):
        assert state.tools is not None and state.guides is not None, "checked: a format needs a tokenizer"
        functions = [(tool.function.name, _arguments(tool.function)) for tool in use.tools]
        calls = Form("calls", state.tools.grammar(functions, state.guides.literal, use.many))
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
