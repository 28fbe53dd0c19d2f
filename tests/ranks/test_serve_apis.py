"""A real server through its three APIs of conversations: the same text from each, streamed too, and tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from patience import PATIENCE_S, eventually
from server_process import ServerProcess

MODEL = "narrows-demo"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--tp", "2", "--tool-call-parser", "hermes", "--api-key", "secret") as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def message(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 24, "system": "Be brief.", "messages": ASKED[1:], "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": "secret"}, timeout=PATIENCE_S)


def test_every_api_gives_the_same_text(server: ServerProcess, client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, temperature=0)
    text = chat.choices[0].message.content
    ask: dict[str, Any] = {"model": MODEL, "instructions": "Be brief.", "input": "Hello", "max_output_tokens": 24}
    assert client.responses.create(**ask, temperature=0).output_text == text
    with client.responses.stream(**ask, temperature=0) as events:
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    whole = message(server).json()
    assert whole["content"] == [{"type": "text", "text": text}]
    lines = message(server, stream=True).text.splitlines()
    deltas = [json.loads(line.removeprefix("data: ")).get("delta", {}) for line in lines if line.startswith("data: ")]
    assert "".join(delta.get("text", "") for delta in deltas) == text
    usage = chat.usage
    assert usage is not None and whole["usage"]["output_tokens"] == usage.completion_tokens
    counted = whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    assert counted == usage.prompt_tokens


def test_a_tool_is_called_through_each(server: ServerProcess, client: OpenAI) -> None:
    tool: Any = {"type": "function", "name": "add", "parameters": PERSON, "strict": True}
    choice: Any = {"type": "function", "name": "add"}
    response = client.responses.create(
        model=MODEL, input="Add", tools=[tool], tool_choice=choice, max_output_tokens=150, extra_body={"seed": 1}
    )
    (call,) = response.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"name", "age"}
    fields = {"tools": [{"name": "add", "input_schema": PERSON}], "tool_choice": {"type": "tool", "name": "add"}}
    answer = message(server, **fields, max_tokens=150, temperature=1, seed=1).json()
    (use,) = answer["content"]
    assert set(use["input"]) == {"name", "age"} and answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_stream_that_is_left_frees_its_pages(server: ServerProcess, path: str) -> None:
    asked = {"input": "Hello", "max_output_tokens": 1500} if "responses" in path else {"messages": ASKED[1:]}
    body = {"max_tokens": 1500} if "messages" in path else {}
    headers = {"authorization": "Bearer secret"}
    fields = {**asked, **body, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + path, json=fields, headers=headers, timeout=PATIENCE_S) as answer:
        next(line for line in answer.iter_lines() if "delta" in line)

    def pages() -> float:
        lines = httpx.get(f"{server.url}/metrics", headers=headers).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("narrows_kv_pages_used "))

    eventually(lambda: pages() == 0)
