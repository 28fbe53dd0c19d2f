"""OpenAI's Python client: the responses API as its users call it, and chats that send its output back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from conftest import KEY, MODEL
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=8)
    sign: Literal["ram", "bull"]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_response_and_its_stream(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "input": "Hello", "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**ask, instructions="Be brief.", store=False)
    assert whole.output_text and whole.usage is not None and whole.usage.output_tokens <= 24
    assert whole.status in ("completed", "incomplete")
    raw = [event for event in client.responses.create(**ask, instructions="Be brief.", stream=True)]
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    with client.responses.stream(**ask, instructions="Be brief.") as events:
        kinds = [event.type for event in events]
    text = "".join(event.delta for event in raw if event.type == "response.output_text.delta")
    assert text == whole.output_text and kinds[0] == "response.created"
    assert raw[-1].type == kinds[-1] == f"response.{whole.status}"


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input="Who?", text_format=Person, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(model=MODEL, input="Who?", text_format=Person, max_output_tokens=200) as events:
        assert isinstance(events.get_final_response().output_parsed, Person)
    chat = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], response_format=Person, max_tokens=200
    )
    assert isinstance(chat.choices[0].message.parsed, Person)


def test_a_tool_is_called_and_its_result_sent_back(client: openai.OpenAI, person: dict[str, Any]) -> None:
    tool: Any = {"type": "function", "name": "add", "description": "d", "parameters": person, "strict": True}
    ask: dict[str, Any] = {"model": MODEL, "tools": [tool], "max_output_tokens": 200, "parallel_tool_calls": False}
    given: list[Any] = [{"role": "user", "content": "Add somebody"}]
    first = client.responses.create(input=given, tool_choice="required", **ask)
    (call,) = first.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"name", "age"}
    given += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    second = client.responses.create(input=given, tool_choice="none", **ask)
    assert second.output[0].type == "message"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    with client.responses.stream(input=given[:1], tool_choice=allowed, **ask) as events:
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        (called,) = events.get_final_response().output
    assert called.type == "function_call" and "".join(deltas) == called.arguments


def test_allowed_tools_and_refusals_in_chats(client: openai.OpenAI, person: dict[str, Any]) -> None:
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": person}} for name in ("add", "sub")]
    allowed: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "sub"}}]}
    messages: Any = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"role": "user", "content": "Do"},
    ]
    done = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=tools,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        parallel_tool_calls=False,
        max_tokens=200,
    )
    message = done.choices[0].message
    assert message.tool_calls is not None and message.tool_calls[0].function.name == "sub"
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
    again = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=8)
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
    ],
)
def test_fields_that_need_a_store_or_other_tools_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(**{"model": MODEL, "input": "x", **fields})
    assert wrong.value.param == param


def test_missing_routes_give_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="makes no embeddings"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError, match="moderates none"):
        client.moderations.create(input="x")
    with pytest.raises(openai.NotFoundError, match="keeps nothing"):
        client.responses.retrieve("resp_1")
