"""``/v1/chat/completions`` through the real application: messages, reasoning, tool calls, forms, log-probabilities."""

import asyncio
import json
import re

import pytest
import server_lab as lab

from narrows.server.options import ServerOptions
from narrows.server.schema.answers import ChatCompletion

ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
ADD["additionalProperties"] = False
TOOLS = [{"type": "function", "function": {"name": name, "parameters": ADD}} for name in ("add", "sub")]


def ask(of: lab.Lab, text="hi", **fields):
    answer = asyncio.run(of.chat(text, **fields))
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate(answer.json(), strict=True)
    return answer.json()["choices"][0]


def stream(of: lab.Lab, text="hi", **fields):
    """The deltas of a stream put together as a message, its finish reason, and its pieces."""
    events = asyncio.run(of.events("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields}))
    assert events.pop() == "[DONE]"
    message, reason, entries = {"content": "", "tool_calls": []}, None, []
    for event in events:
        entry = event["choices"][0]
        entries.append(entry)
        delta = entry["delta"]
        reason = entry["finish_reason"] or reason
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    assert entries[0]["delta"]["role"] == "assistant"
    return message, reason, entries


def prompt_of(of: lab.Lab) -> str:
    return of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False)


def test_messages_go_through_the_template(plain: lab.Lab) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
    ]
    answer = asyncio.run(plain.post("/v1/chat/completions", {"messages": messages, "max_completion_tokens": 5}))
    assert answer.status_code == 200
    assert prompt_of(plain) == "<|begin|>[developer]Be brief.[user]one two[assistant][assistant]".replace(
        "developer", "system"
    )
    assert plain.sent.max_tokens == 5


def test_without_a_limit_a_chat_may_fill_the_context(plain: lab.Lab) -> None:
    choice = ask(plain)
    assert plain.sent.max_tokens == 512 - len(plain.sent.prompt)
    assert choice["message"] == {"role": "assistant", "content": "Hello world"} and choice["finish_reason"] == "stop"


def test_log_probabilities_by_token(plain: lab.Lab) -> None:
    plain.text = "aé"
    found = ask(plain, logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in found[:-1]).decode() == plain.text
    assert found[-1]["token"] == "<|end|>" and all(len(entry["top_logprobs"]) == 2 for entry in found)
    assert ask(plain, logprobs=True)["logprobs"]["content"][0]["top_logprobs"] == []
    _, _, entries = stream(plain, logprobs=True, top_logprobs=2)
    assert [e for entry in entries for e in (entry["logprobs"] or {"content": []})["content"]] == found


def test_reasoning_is_separated(hermes: lab.Lab) -> None:
    hermes.text = "<think>\nLet me see.\n</think>\n\nIt is <b>.\n"
    choice = ask(hermes)
    assert choice["message"]["reasoning_content"] == "Let me see." and choice["message"]["content"] == "It is <b>.\n"
    message, _, _ = stream(hermes)
    assert message == {"content": "It is <b>.\n", "reasoning_content": "Let me see.", "tool_calls": []}
    answer = asyncio.run(hermes.chat())
    thought = len(hermes.tokenizer.encode("\nLet me see.\n</think>", add_special_tokens=False))
    assert abs(answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] - thought) <= 2


def test_reasoning_that_the_prompt_has_opened(hermes: lab.Lab) -> None:
    hermes.text = "Let me see.</think>Yes"
    choice = ask(hermes, chat_template_kwargs={"thinking": True})
    assert prompt_of(hermes).endswith("<think>")
    assert choice["message"]["reasoning_content"] == "Let me see." and choice["message"]["content"] == "Yes"
    assert ask(hermes)["message"]["content"] == hermes.text, "without the tag in front it is content"


def test_reasoning_parser_none_leaves_it_in_content(make_lab, hermes_tokenizer) -> None:
    of = make_lab(ServerOptions(reasoning_parser="none"), tokenizer=hermes_tokenizer)
    of.text = "<think>a</think>b"
    assert ask(of)["message"] == {"role": "assistant", "content": of.text}


CALLS = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": true}}\n</tool_call>'


def test_tool_calls(hermes: lab.Lab) -> None:
    hermes.text = f"I will add.\n{CALLS}\n{CALLS.replace('add', 'sub')}"
    choice = ask(hermes, tools=TOOLS)
    assert "<tools>" in prompt_of(hermes)
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "I will add." and choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in calls] == ["add", "sub"]
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1, "b": True} for call in calls)
    assert len({call["id"] for call in calls}) == 2
    hermes.backend.pause_s = 0.003
    message, reason, entries = stream(hermes, tools=TOOLS)
    assert reason == "tool_calls" and message["content"] == "I will add."
    assert message["tool_calls"] == [call["function"] for call in calls]
    first = [e["delta"]["tool_calls"][0]["function"]["arguments"] for e in entries if "tool_calls" in e["delta"]]
    assert len(first) > 6, "arguments come as they are written"


def test_parallel_tool_calls_false_gives_one_call(hermes: lab.Lab) -> None:
    hermes.text = CALLS + CALLS
    assert len(ask(hermes, tools=TOOLS, parallel_tool_calls=False)["message"]["tool_calls"]) == 1


def test_without_tools_or_with_none_chosen_a_call_is_text(hermes: lab.Lab) -> None:
    hermes.text = CALLS
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = ask(hermes, **fields)
        assert choice["message"]["content"] == CALLS and choice["finish_reason"] == "stop"
        assert "<tools>" not in prompt_of(hermes)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sub"}}])
def test_a_required_call_is_forced(
    make_lab, hermes_tokenizer, plain_tokenizer, choice, seed: int, thinking: bool
) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
    if thinking:
        of = make_lab(tokenizer=hermes_tokenizer)
        of.backend.prefer = of.tokenizer.encode("hm</think>", add_special_tokens=False)
        found = ask(of, chat_template_kwargs={"thinking": True}, **fields)
        assert found["message"]["reasoning_content"] == "hm"
    else:
        found = ask(make_lab(ServerOptions(tool_call_parser="hermes"), tokenizer=plain_tokenizer), **fields)
    (call,) = found["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert found["finish_reason"] == "tool_calls" and set(arguments) == {"a", "b"}
    assert arguments["a"] in (1, 2) and isinstance(arguments["b"], bool)
    assert call["function"]["name"] in (("add", "sub") if choice == "required" else ("sub",))


def test_past_calls_reach_the_template_as_objects(hermes: lab.Lab) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    answer = asyncio.run(hermes.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS}))
    assert answer.status_code == 200 and "[('a', 1)]" in prompt_of(hermes) and "[tool]2" in prompt_of(hermes)


@pytest.mark.parametrize("seed", range(4))
def test_text_matches_the_requested_structure(plain: lab.Lab, seed: int) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}, "y": {"type": "boolean"}}, "required": ["x", "y"]}
    schema["additionalProperties"] = False
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    value = json.loads(ask(plain, response_format=asked, seed=seed)["message"]["content"])
    assert set(value) == {"x", "y"} and value["x"] in (1, 2) and isinstance(value["y"], bool)
    asked = {"type": "regex", "pattern": "(a|b){3}/[0-9]{2}"}
    assert re.fullmatch(asked["pattern"], ask(plain, response_format=asked, seed=seed)["message"]["content"])
    for fields in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        assert ask(plain, seed=seed, **fields)["message"]["content"] in ("yes", "no")


def test_structured_output_still_allows_tool_calls(make_lab) -> None:
    of = make_lab(ServerOptions(tool_call_parser="hermes"))
    fields = {"response_format": {"type": "regex", "pattern": "[0-9]{2}"}, "tools": TOOLS}
    for begins, is_call in (("<tool_call>", True), ("7", False)):
        of.backend.prefer = of.tokenizer.encode(begins, add_special_tokens=False)
        for seed in range(3):
            message = ask(of, seed=seed, **fields)["message"]
            assert ("tool_calls" in message) == is_call
            assert is_call or re.fullmatch("[0-9]{2}", message["content"])
