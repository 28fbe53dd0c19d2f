"""``/v1/messages``: blocks, events in their order, tools, reasoning, refusals, and errors in Anthropic's shape.

The real client is tried by ``make test-clients``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from patience import eventually
from server_lab import Lab

from narrows.api import QueueFull
from narrows.server.anthropic.request import CountRequest, chat_of
from narrows.server.options import ServerOptions
from narrows.server.schema.answers import MessageAnswer

PATH = "/v1/messages"
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"name": name, "input_schema": ADD} for name in ("add", "sub")]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]


def post(of: Lab, messages: Any = None, path: str = PATH, **fields: Any) -> httpx.Response:
    return asyncio.run(of.post(path, {"max_tokens": 400, "messages": messages or HI, **fields}))


def ask(of: Lab, messages: Any = None, **fields: Any) -> dict[str, Any]:
    """The answer, valid by the document of this server."""
    answer = post(of, messages, **fields)
    assert answer.status_code == 200, answer.text
    MessageAnswer.model_validate(answer.json(), strict=True)
    return answer.json()


def stream(of: Lab, messages: Any = None, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each named as it says itself."""
    answer = post(of, messages, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *blocks, last = answer.text.split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert last == ""
    return events


def told(events: list[dict[str, Any]]) -> list[str]:
    """The kinds of events in order; repeated deltas once."""
    names = [
        event["type"].removeprefix("content_block_")
        + (f" {event['content_block']['type']}" if "content_block" in event else "")
        + (f" {event['delta']['type']}" if event["type"] == "content_block_delta" else "")
        for event in events
    ]
    return [name for at, name in enumerate(names) if not (name.startswith("delta") and names[at - 1] == name)]


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events: Anthropic's rules, read from its client."""
    message = events[0]["message"]
    texts: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            assert event["index"] == len(message["content"]) - 1
            if delta["type"] == "input_json_delta":
                texts[event["index"]] = texts.get(event["index"], "") + delta["partial_json"]
                continue
            (key,) = set(delta) - {"type"}
            block[key] += delta[key]
        elif event["type"] == "content_block_stop" and event["index"] in texts:
            message["content"][event["index"]]["input"] = json.loads(texts[event["index"]])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": None, "content": content}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"type", "error"} and body["type"] == "error" and set(body["error"]) == {"type", "message"}
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


def prompt_of(of: Lab) -> str:
    return of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False)


@pytest.fixture
def wide(make_lab: Callable[..., Lab], hermes_tokenizer: Any) -> Lab:
    """A model that thinks and calls, with room for it."""
    return make_lab(tokenizer=hermes_tokenizer, max_context=2048)


START = ["message_start", "ping"]
END = ["message_delta", "message_stop"]
TEXT = ["start text", "delta text_delta", "stop"]
THOUGHT = ["start thinking", "delta thinking_delta", "delta signature_delta", "stop"]
USE = ["start tool_use", "delta input_json_delta", "stop"]


def test_a_text(plain: Lab) -> None:
    message = ask(plain, system="Be brief.", temperature=0.5, top_k=3, metadata={"user_id": "me"})
    assert message["content"] == [{"type": "text", "text": "Hello world"}]
    assert (message["stop_reason"], message["stop_sequence"], message["role"]) == ("end_turn", None, "assistant")
    assert prompt_of(plain) == "<|begin|>[system]Be brief.[user]hi[assistant]"
    assert plain.sent.sampling.temperature == 0.5 and plain.sent.sampling.top_k == 3 and plain.sent.max_tokens == 400
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(plain.sent.prompt)
    assert usage["cache_read_input_tokens"] == 4 and usage["cache_creation_input_tokens"] == 0
    assert usage["output_tokens"] == len(plain.tokenizer.encode("Hello world", add_special_tokens=False)) + 1


def test_stream_is_the_whole_in_api_order(plain: Lab) -> None:
    events = stream(plain)
    assert told(events) == [*START, *TEXT, *END]
    begin = events[0]["message"]
    assert (begin["content"], begin["stop_reason"], begin["usage"]["output_tokens"]) == ([], None, 0)
    assert without_ids(put_together(events)) == without_ids(ask(plain))


def test_thoughts_and_tools_are_blocks_of_their_own(wide: Lab) -> None:
    wide.text = f"<think>Let me see.</think>I add.\n{CALL}\n{CALL.replace('add', 'sub')}"
    events = stream(wide, tools=TOOLS)
    assert told(events) == [*START, *THOUGHT, *TEXT, *USE, *USE, *END]
    message = ask(wide, tools=TOOLS)
    assert without_ids(put_together(events)) == without_ids(message) and message["stop_reason"] == "tool_use"
    thought, text, *uses = message["content"]
    assert thought["thinking"] == "Let me see." and thought["signature"] and text["text"] == "I add."
    assert [(use["name"], use["input"]) for use in uses] == [("add", {"a": 1}), ("sub", {"a": 1})]
    assert len({use["id"] for use in uses}) == 2


def test_the_blocks_of_an_answer_can_be_sent_back(wide: Lab) -> None:
    wide.text = f"<think>hm</think>I add.\n{CALL}"
    first = ask(wide, tools=TOOLS)
    use = first["content"][-1]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "2"}]}
    texts = [{"type": "text", "text": "so"}, {"type": "text", "text": "what?", "cache_control": {"type": "ephemeral"}}]
    back = [*HI, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result, *texts]}]
    ask(wide, [*back, {"role": "user", "content": "Well?"}], tools=TOOLS, system=[{"type": "text", "text": "S"}] * 2)
    calls = "[assistant]I add.<tool_call>[('a', 1)]</tool_call>[tool]2"
    assert prompt_of(wide).endswith(f"[system]S\nS[user]hi{calls}[user]so\nwhat?\nWell?[assistant]")
    empty = {"type": "tool_result", "tool_use_id": use["id"]}
    ask(wide, [*back[:2], {"role": "user", "content": [empty]}], tools=TOOLS)
    assert prompt_of(wide).endswith("[tool][assistant]")


def test_reasoning_sent_back_stays_with_its_message() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "unsigned"}
    unread = {"type": "redacted_thinking", "data": "x"}
    content = [unread, thought, {"type": "text", "text": "yes"}]
    body = CountRequest.model_validate({"messages": [{"role": "assistant", "content": content}]})
    (message,) = chat_of(body).messages
    assert (message.reasoning_content, message.content) == ("hm", "yes")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("choice", "names"), [({"type": "any"}, {"add", "sub"}), ({"type": "tool", "name": "sub"}, {"sub"})]
)
def test_a_tool_that_has_to_be_used_is(
    make_lab: Callable[..., Lab], choice: dict[str, Any], names: set[str], seed: int
) -> None:
    of = make_lab(ServerOptions(tool_call_parser="hermes"))
    message = ask(of, tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True}, seed=seed)
    (use,) = message["content"]
    assert use["type"] == "tool_use" and use["name"] in names and use["input"]["a"] in (1, 2)
    assert message["stop_reason"] == "tool_use"


def test_tool_choice_none_hides_the_tools(hermes: Lab) -> None:
    hermes.text = CALL
    message = ask(hermes, tools=TOOLS, tool_choice={"type": "none"})
    assert message["content"] == [{"type": "text", "text": CALL}] and "<tools>" not in prompt_of(hermes)


def test_truncated_arguments_are_marked(hermes: Lab) -> None:
    hermes.text = CALL
    cut = len(hermes.tokenizer.encode(CALL.partition("1")[0], add_special_tokens=False))
    message = ask(hermes, tools=TOOLS[:1], max_tokens=cut)
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"INVALID_JSON": '{"a": '}


def test_the_assistant_s_last_message_is_gone_on_with(hermes: Lab) -> None:
    ask(hermes, [*HI, {"role": "assistant", "content": [{"type": "text", "text": "The best"}]}])
    assert prompt_of(hermes) == "<|begin|>[user]hi[assistant]The best"
    use = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}
    ask(hermes, [*HI, {"role": "assistant", "content": [{"type": "text", "text": "So"}, use]}], tools=TOOLS[:1])
    assert prompt_of(hermes).endswith("So<tool_call>[('a', 1)]</tool_call>[assistant]")


@pytest.mark.parametrize("seed", range(3))
def test_structured_output_is_enforced(plain: Lab, seed: int) -> None:
    form = {"type": "json_schema", "schema": ADD}
    (block,) = ask(plain, output_config={"format": form}, seed=seed)["content"]
    assert json.loads(block["text"])["a"] in (1, 2)


def test_why_a_message_ended(plain: Lab) -> None:
    stopped = ask(plain, stop_sequences=["x", "wor"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "wor")
    assert stopped["content"][0]["text"] == "Hello "
    assert stream(plain, stop_sequences=["wor"])[-2]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": "wor",
    }
    assert ask(plain, max_tokens=1)["stop_reason"] == "max_tokens"
    plain.text = "word " * 600
    full = ask(plain, max_tokens=32_000)
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert plain.sent.max_tokens == 512 - len(plain.sent.prompt) == full["usage"]["output_tokens"]


def test_no_text_at_all_is_an_empty_block(plain: Lab) -> None:
    plain.text = ""
    assert ask(plain)["content"] == [{"type": "text", "text": ""}]
    assert told(stream(plain)) == [*START, "start text", "stop", *END]


def test_thinking_is_a_variable_of_the_template(hermes: Lab) -> None:
    for kind, ends in (("enabled", "<think>"), ("adaptive", "<think>"), ("disabled", "[assistant]")):
        ask(hermes, thinking={"type": kind})
        assert prompt_of(hermes).endswith(ends), kind


def test_tokens_are_counted_as_the_model_reads_them(hermes: Lab) -> None:
    body = {"messages": HI, "system": "S", "tools": TOOLS}
    answer = asyncio.run(hermes.post(f"{PATH}/count_tokens", body))
    assert answer.status_code == 200 and not hermes.backend.submitted
    ask(hermes, **body, max_tokens=5)
    assert answer.json() == {"input_tokens": len(hermes.sent.prompt)}
    long = asyncio.run(hermes.post(f"{PATH}/count_tokens", {"messages": [{"role": "user", "content": "word " * 900}]}))
    assert long.json()["input_tokens"] > 512, "more than the context holds is counted too"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, "the prompt has"),
        ({"temperature": "1"}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"stop": "x"}, "stop_sequences"),
        ({"n": 2}, "n:"),
        ({"response_format": {"type": "json_object"}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "output_config.format.schema"),
        ({"thinking": {"type": "enabled", "budget_tokens": 400}}, "thinking.budget_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
    ],
)
def test_unsupported_fields_are_refused_by_name(hermes: Lab, fields: dict[str, Any], names: str) -> None:
    answer = asyncio.run(hermes.post(PATH, {"max_tokens": 400, "messages": HI, **fields}))
    error = error_of(answer)
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and names in error["message"], error
    assert not hermes.backend.submitted


def test_errors_have_the_shape_of_the_api_wherever_they_come_from(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(api_keys=("secret",), max_body_bytes=500))
    key = {"x-api-key": "secret"}

    def sent(path: str = PATH, headers: Any = key, **fields: Any) -> tuple[int, str]:
        answer = asyncio.run(of.post(path, {"max_tokens": 4, "messages": HI, **fields}, headers=headers))
        return answer.status_code, error_of(answer)["type"]

    assert sent(headers={}) == sent(headers={"x-api-key": "wrong"}) == (401, "authentication_error")
    assert sent(model="other") == (404, "not_found_error")
    assert sent(f"{PATH}/batches") == (404, "not_found_error")
    assert sent(system="x" * 600) == (413, "request_too_large")
    assert sent(headers=key | {"content-type": "text/plain"}) == (415, "invalid_request_error")
    of.backend.refuse = QueueFull("1024 texts wait", retry_after_s=3)
    assert sent() == (429, "rate_limit_error")
    of.backend.refuse = RuntimeError("a bug")
    assert sent() == (500, "api_error")
    of.backend.refuse = None
    of.backend.draining = True
    assert sent() == (503, "overloaded_error")


def test_x_api_key_works_on_anthropic_routes_only(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(api_keys=("secret", "other")))
    body = {"max_tokens": 4, "messages": HI}
    for headers in ({"x-api-key": "secret"}, {"x-api-key": "other"}, {"authorization": "Bearer secret"}):
        assert asyncio.run(of.post(PATH, body, headers=headers)).status_code == 200
    for headers in (
        {"x-api-key": "secre"},
        {"x-api-key": ""},
        {"authorization": "Bearer"},
        {"authorization": "secret"},
    ):
        assert asyncio.run(of.post(PATH, body, headers=headers)).status_code == 401
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messagesx"):
        assert asyncio.run(of.post(path, body, headers={"x-api-key": "secret"})).status_code == 401


def test_a_failure_ends_the_stream_as_an_error(plain: Lab) -> None:
    plain.backend.fail_after = 1
    events = stream(plain)
    assert told(events)[-1] == "error" and "message_stop" not in told(events)
    assert events[-1]["error"]["type"] == "api_error" and "rank 1 died" in events[-1]["error"]["message"]
    answer = post(plain)
    assert answer.status_code == 500 and "rank 1 died" in error_of(answer)["message"]


def test_a_client_that_leaves_ends_the_generation(plain: Lab) -> None:
    plain.backend.gate.clear()

    async def leave() -> None:
        async with plain.client() as client:
            task = asyncio.ensure_future(client.post(PATH, json={"max_tokens": 400, "messages": HI}))
            while not plain.backend.submitted:
                await asyncio.sleep(0.01)
            task.cancel()

    asyncio.run(leave())
    eventually(lambda: plain.backend.num_live == 0)
    plain.backend.gate.set()
