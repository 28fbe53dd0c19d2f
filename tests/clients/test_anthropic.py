"""Anthropic's Python client: messages, streams, tools, counted tokens and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from conftest import KEY, MODEL
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Ann", "Bob"]  # the client turns a maxLength into a sentence of the description
    tall: bool


GREEDY: Any = {"extra_body": {"temperature": 0}}
HI: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_message_and_its_stream(client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": HI,
        "system": "Be brief.",
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**ask)
    (block,) = whole.content
    assert block.type == "text" and block.text and whole.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == block.text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(stream=True, **ask)]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-2:] == ["message_delta", "message_stop"]


def test_stop_sequences_and_counted_tokens(client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 24, **GREEDY}
    (block,) = client.messages.create(**ask).content
    stop = block.text.strip()[1:3]
    cut = client.messages.create(stop_sequences=[stop, "\u2603"], **ask)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    counted = client.messages.count_tokens(model=MODEL, messages=HI)
    assert counted.input_tokens == cut.usage.input_tokens + (cut.usage.cache_read_input_tokens or 0)


def test_a_tool_is_used_and_its_result_sent_back(client: anthropic.Anthropic, person: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": [{"name": "add", "input_schema": person}]}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(messages=HI, tool_choice=choice, **ask)
    (use,) = first.content
    assert first.stop_reason == "tool_use" and use.type == "tool_use" and set(use.input) == {"name", "age"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "done"}
    back: Any = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=back, tool_choice={"type": "none"}, **ask)
    assert second.content[0].type == "text"
    with client.messages.stream(messages=HI, tool_choice={"type": "tool", "name": "add"}, **ask) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and json.loads("".join(pieces)) == streamed.input


def test_structured_output_is_parsed(client: anthropic.Anthropic) -> None:
    parsed = client.messages.parse(model=MODEL, max_tokens=200, messages=HI, output_format=Person)
    assert isinstance(parsed.parsed_output, Person)


def test_errors_raise_the_clients_own_exceptions(client: anthropic.Anthropic, server: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="no", max_tokens=5, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.type"):
        search: Any = {"type": "web_search_20250305", "name": "web_search"}
        client.messages.create(model=MODEL, max_tokens=5, messages=HI, tools=[search])
    stranger = anthropic.Anthropic(base_url=server, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
        stranger.messages.create(model=MODEL, max_tokens=5, messages=HI)
