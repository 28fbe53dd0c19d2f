"""The tools that a chat may call (``allowed_tools``), unsupported tools, and parts of past answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from server_lab import Lab, error_of

from narrows.server.options import ServerOptions

ARGUMENTS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": ARGUMENTS}} for n in ("add", "sub", "mul")]


def call_of(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": 1}}}}\n</tool_call>'


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def prompt_of(of: Lab) -> str:
    return of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False)


def message_of(of: Lab, **fields: Any) -> dict[str, Any]:
    answer = asyncio.run(of.chat(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def test_tools_that_are_not_allowed_are_neither_shown_nor_called(hermes: Lab) -> None:
    hermes.text = "Well. " + "\n".join(map(call_of, ("mul", "sub", "mul", "add")))
    fields = {"tools": TOOLS, "tool_choice": allowed("auto", "add", "sub")}
    message = message_of(hermes, **fields)
    shown = prompt_of(hermes)
    assert '"add"' in shown and '"sub"' in shown and '"mul"' not in shown
    assert message["content"] == "Well."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["sub", "add"]
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in message["tool_calls"])
    events = asyncio.run(
        hermes.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})
    )
    pieces = [call for e in events[:-1] for call in e["choices"][0]["delta"].get("tool_calls", ())]
    assert [(p["index"], p["function"]["name"]) for p in pieces if "id" in p] == [(0, "sub"), (1, "add")]
    assert {p["index"] for p in pieces} == {0, 1}
    one = message_of(hermes, **fields, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["sub"]
    free = message_of(hermes, tools=TOOLS[:1], tool_choice="auto")
    assert free["tool_calls"][0]["function"]["name"] == "mul", "where no choice is made, the client hears of any call"


@pytest.mark.parametrize("seed", range(4))
def test_an_allowed_tool_is_called_if_required(make_lab: Callable[..., Lab], seed: int) -> None:
    fields = {"tools": TOOLS, "seed": seed, "parallel_tool_calls": False}
    of = make_lab(ServerOptions(tool_call_parser="hermes"))
    message = message_of(of, tool_choice=allowed("required", "mul", "sub"), **fields)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] in ("mul", "sub") and json.loads(call["function"]["arguments"])["a"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "custom tool"),
        ({"tools": [*TOOLS, {"type": "web_search"}]}, "tools.3.type", "'web_search' is run by the server"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "div")}, "tool_choice", "'div', which is not among tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "is missing"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        ({"tool_choice": allowed("auto", "add")}, "tool_choice", "no tools"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused_by_name(
    hermes: Lab, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = asyncio.run(hermes.chat(**fields))
    error = error_of(answer)
    assert answer.status_code == 400 and error["param"] == param and says in error["message"], error
    assert not hermes.backend.submitted


def test_parts_of_past_answers_are_read(hermes: Lab) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "never"},
        {"role": "assistant", "content": "so", "refusal": None},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "yes"}],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
    ]
    answer = asyncio.run(hermes.post("/v1/chat/completions", {"messages": messages}))
    assert answer.status_code == 200, answer.text
    said = "[user]a[assistant]no[assistant]never[assistant]so[assistant]yes[user]b[assistant]"
    assert prompt_of(hermes) == f"<|begin|>{said}"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "refusal"}, {"type": "text"}]
)
def test_parts_that_are_no_text_are_refused_by_place(hermes: Lab, part: dict[str, Any]) -> None:
    answer = asyncio.run(hermes.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}))
    assert answer.status_code == 400 and error_of(answer)["param"] == "messages.0.content.0"
