"""``/v1/responses`` with OpenAI's types: items, events in their order, tools, structured output, refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from patience import eventually
from pydantic import BaseModel, TypeAdapter
from server_lab import Lab, error_of

from narrows.server.http.errors import ApiError
from narrows.server.openai.responses import ResponseWriter
from narrows.server.openai.responses_request import ResponsesRequest, chat_of
from narrows.server.options import ServerOptions
from narrows.server.parsers.events import Content, Reasoning
from narrows.server.schema.answers import ResponseAnswer

PATH = "/v1/responses"
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "name": name, "parameters": ADD, "description": None} for name in ("add", "sub")]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def with_client(of: Lab, use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(of.app, raise_app_exceptions=False))
        async with openai.AsyncOpenAI(
            base_url="http://lab/v1", api_key="none", http_client=http, max_retries=0
        ) as made:
            return await use(made)

    return asyncio.run(run())


def ask(of: Lab, given: Any = "hi", **fields: Any) -> Response:
    """The answer, valid by OpenAI's types and by the document of this server."""
    answer = asyncio.run(of.post(PATH, {"input": given, **fields}))
    assert answer.status_code == 200, answer.text
    ResponseAnswer.model_validate(answer.json(), strict=True)
    return Response.model_validate(answer.json())


def stream(of: Lab, given: Any = "hi", **fields: Any) -> list[Any]:
    """The events of a stream, each valid by OpenAI's types, numbered and named as it says itself."""
    answer = asyncio.run(of.post(PATH, {"input": given, "stream": True, **fields}))
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *blocks, last = answer.text.split("\n\n")
    assert last == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}" and value["sequence_number"] == number
        events.append(EVENT.validate_python(value))
        assert events[-1].type == value["type"], "no event that OpenAI's types do not know"
    return events


def told(events: list[Any]) -> list[str]:
    """The names of events, repeated deltas once."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if not (name.endswith("delta") and at and names[at - 1] == name)]


def prompt_of(of: Lab) -> str:
    return of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False)


def without_ids(response: Response) -> dict[str, Any]:
    value = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in value["output"]:
        assert item.pop("id")
        item.pop("call_id", None)
    return value


@pytest.fixture
def wide(make_lab: Callable[..., Lab], hermes_tokenizer: Any) -> Lab:
    """A model that thinks and calls, with room for it."""
    return make_lab(tokenizer=hermes_tokenizer, max_context=2048)


TEXT = ["output_item.added", "content_part.added", "output_text.delta"]
TEXT += ["output_text.done", "content_part.done", "output_item.done"]
THOUGHT = [name.replace("output_text", "reasoning_text") for name in TEXT]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def test_a_text(plain: Lab) -> None:
    response = ask(plain, instructions="Be brief.", metadata={"k": "v"}, temperature=0.5, top_p=0.9, user="me")
    assert response.output_text == "Hello world" and response.status == "completed"
    assert prompt_of(plain) == "<|begin|>[system]Be brief.[user]hi[assistant]"
    assert response.model_extra["store"] is False and response.metadata == {"k": "v"}
    assert (response.temperature, response.top_p, response.tool_choice) == (0.5, 0.9, "auto")
    assert plain.sent.sampling.temperature == 0.5
    usage = response.usage
    assert usage.input_tokens == len(plain.sent.prompt) and usage.input_tokens_details.cached_tokens == 4
    assert usage.output_tokens == len(plain.tokenizer.encode("Hello world", add_special_tokens=False)) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_stream_is_the_whole_in_api_order(plain: Lab) -> None:
    events = stream(plain)
    assert told(events) == ["created", "in_progress", *TEXT, "completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello world"
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[2].item.content == [] and events[2].item.status == "in_progress"
    assert without_ids(events[-1].response) == without_ids(ask(plain))
    (item,) = events[-1].response.output
    assert events[-2].item == item and {e.item_id for e in events if hasattr(e, "item_id")} == {item.id}


@pytest.mark.parametrize("streams", [False, True])
def test_a_text_that_is_cut_is_incomplete(plain: Lab, streams: bool) -> None:
    if streams:
        events = stream(plain, max_output_tokens=1)
        assert told(events)[-1] == "incomplete"
        response = events[-1].response
    else:
        response = ask(plain, max_output_tokens=1)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete" and response.usage.output_tokens == 1


def test_a_thought_and_calls_are_items_of_their_own(wide: Lab) -> None:
    wide.text = f"<think>Let me see.</think>I add.\n{CALL}\n{CALL.replace('add', 'sub')}"
    events = stream(wide, tools=TOOLS)
    assert told(events) == ["created", "in_progress", *THOUGHT, *TEXT, *CALLED, *CALLED, "completed"]
    whole = ask(wide, tools=TOOLS)
    assert without_ids(events[-1].response) == without_ids(whole)
    thought, message, *calls = whole.output
    assert thought.content[0].text == "Let me see." and message.content[0].text == "I add."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("add", {"a": 1}), ("sub", {"a": 1})]
    assert len({call.call_id for call in calls}) == 2 and whole.usage.output_tokens_details.reasoning_tokens > 0
    done = [e for e in events if e.type == "response.output_item.done"]
    assert [e.output_index for e in done] == [0, 1, 2, 3] and [e.item for e in done] == events[-1].response.output


def test_no_text_at_all_is_an_empty_message(plain: Lab) -> None:
    plain.text = ""
    assert [(item.type, item.content[0].text) for item in ask(plain).output] == [("message", "")]
    assert told(stream(plain)) == ["created", "in_progress", *[n for n in TEXT if "delta" not in n], "completed"]


def test_the_items_of_an_answer_can_be_sent_back(wide: Lab) -> None:
    wide.text = f"<think>hm</think>I add.\n{CALL}"
    first = ask(wide, [{"role": "user", "content": "1 + 1?"}], tools=TOOLS)
    call = first.output[-1]
    back = [item.model_dump() for item in first.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    parts = [{"type": "input_text", "text": "so"}, {"type": "input_text", "text": "?"}]
    given = [
        {"role": "user", "content": "1 + 1?"},
        *back,
        result,
        {"type": "message", "role": "user", "content": parts},
    ]
    ask(wide, given, tools=TOOLS)
    assert "[user]1 + 1?[assistant]I add.<tool_call>[('a', 1)]</tool_call>[tool]2[user]so?[assistant]" in prompt_of(
        wide
    )
    refused = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    ask(wide, [refused, {"role": "developer", "content": "d"}, {"type": "reasoning", "summary": [], "id": "rs_1"}])
    assert prompt_of(wide) == "<|begin|>[assistant]no[system]d[assistant]"


def test_reasoning_sent_back_belongs_to_the_answer_after_it() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    short = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "so"}]}
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    said = {"role": "assistant", "content": "yes"}
    body = ResponsesRequest.model_validate({"input": [thought, said, call, short, said]})
    first, second = chat_of(body).messages
    assert (first.reasoning_content, first.content, second.reasoning_content, second.content) == (
        "hm",
        "yes",
        "so",
        "yes",
    )
    assert [each["id"] for each in first.tool_calls or ()] == ["c"] and second.tool_calls is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"add", "sub"}),
        ({"type": "function", "name": "sub"}, {"sub"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}, {"add"}),
    ],
)
def test_a_requested_call_is_made(make_lab: Callable[..., Lab], choice: Any, names: set[str], seed: int) -> None:
    of = make_lab(ServerOptions(tool_call_parser="hermes"))
    response = ask(of, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=seed)
    (call,) = response.output
    assert call.type == "function_call" and call.name in names and json.loads(call.arguments)["a"] in (1, 2)
    assert response.tool_choice == choice or response.tool_choice.model_dump(exclude_none=True) == choice


class Answer(BaseModel):
    x: bool


def test_parse_and_stream_of_the_client(plain: Lab) -> None:
    async def parsed(client: openai.AsyncOpenAI) -> Any:
        return await client.responses.parse(model="alias", input="hi", text_format=Answer, extra_body={"seed": 3})

    response = with_client(plain, parsed)
    assert isinstance(response.output_parsed, Answer) and response.model == "alias"
    assert response.text.format.type == "json_schema" and response.text.format.name == "Answer"

    async def streamed(client: openai.AsyncOpenAI) -> Any:
        async with client.responses.stream(model="alias", input="hi") as events:
            texts = [event.delta async for event in events if event.type == "response.output_text.delta"]
            return texts, await events.get_final_response()

    texts, final = with_client(plain, streamed)
    assert texts and "".join(texts) == final.output_text == "Hello world"


def test_log_probabilities_match_the_text(hermes: Lab) -> None:
    hermes.text = "<think>hm</think>Hello world"
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (thought, message) = ask(hermes, **fields).output
    scores = message.content[0].logprobs
    assert "".join(entry.token for entry in scores[:-1]) == "Hello world" and scores[-1].token == "<|end|>"
    assert all(len(entry.top_logprobs) == 2 for entry in scores) and thought.type == "reasoning"
    events = stream(hermes, **fields)
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [(entry.token, entry.logprob) for entry in done.logprobs] == [(s.token, s.logprob) for s in scores]
    deltas = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    spelled = "".join(entry.token for entry in deltas)
    assert spelled.removesuffix("<|end|>") == "Hello world", "the end comes with the last piece if both come at once"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"include": ["x"]}, "include.0"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}}, "text.format.schema"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "web_search_call"}]}, "input.0.type"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input.0.call_id"),
    ],
)
def test_unsupported_fields_are_refused_by_name(hermes: Lab, fields: dict[str, Any], param: str) -> None:
    answer = asyncio.run(hermes.post(PATH, {"input": "hi", **fields}))
    error = error_of(answer)
    assert answer.status_code == 400 and error["param"] == param, error
    assert not hermes.backend.submitted


def test_a_failed_response_keeps_the_items_that_were_done() -> None:
    writer = ResponseWriter({"id": "resp"})
    writer.take([Reasoning("hm"), Content("Hello")])
    failed = writer.fail(ApiError(500, "rank 1 died"))["response"]
    assert [item["type"] for item in failed["output"]] == ["reasoning"] and failed["status"] == "failed"


def test_a_failure_ends_the_stream(hermes: Lab) -> None:
    hermes.text = "<think>hm</think>Hello world"
    hermes.backend.fail_after = len(hermes.tokenizer.encode("<think>hm</think>Hello", add_special_tokens=False))
    events = stream(hermes)
    assert told(events)[-1] == "failed" and "completed" not in told(events)
    failed = events[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error" and "rank 1 died" in failed.error.message
    answer = asyncio.run(hermes.post(PATH, {"input": "hi"}))
    assert answer.status_code == 500 and "rank 1 died" in error_of(answer)["message"]


def test_a_client_that_leaves_ends_the_generation(plain: Lab) -> None:
    plain.text = "word " * 200
    plain.backend.gate.clear()

    async def leave() -> None:
        async with plain.client() as client:
            task = asyncio.ensure_future(client.post(PATH, json={"input": "hi"}))
            while not plain.backend.submitted:
                await asyncio.sleep(0.01)
            task.cancel()

    asyncio.run(leave())
    eventually(lambda: plain.backend.num_live == 0)
    plain.backend.gate.set()
