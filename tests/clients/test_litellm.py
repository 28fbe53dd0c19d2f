"""LiteLLM: chats, responses and Anthropic's messages through one library."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest
from conftest import KEY, MODEL

HI = [{"role": "user", "content": "Hello"}]


def test_a_chat_and_its_stream(url: str) -> None:
    ask: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": HI}
    ask |= {"max_tokens": 16, "temperature": 0}
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 16
    text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **ask))
    assert text == whole.choices[0].message.content


def test_responses(url: str, person: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "input": "Hello"}
    whole = litellm.responses(max_output_tokens=16, temperature=0, **ask)
    (message,) = whole.output
    assert message.content[0].text
    events = list(litellm.responses(max_output_tokens=16, temperature=0, stream=True, **ask))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == message.content[0].text
    tool = {"type": "function", "name": "add", "parameters": person}
    called = litellm.responses(tools=[tool], tool_choice="required", max_output_tokens=200, **ask)
    assert set(json.loads(called.output[0].arguments)) == {"name", "age"}


def test_anthropic_as_a_chat(server: str, person: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"model": f"anthropic/{MODEL}", "api_base": server, "api_key": KEY, "messages": HI}
    whole = litellm.completion(max_tokens=16, temperature=0, **ask)
    assert whole.choices[0].message.content
    stream = litellm.completion(max_tokens=16, temperature=0, stream=True, **ask)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    tools = [{"type": "function", "function": {"name": "add", "parameters": person}}]
    called = litellm.completion(tools=tools, tool_choice="required", max_tokens=200, **ask)
    assert set(json.loads(called.choices[0].message.tool_calls[0].function.arguments)) == {"name", "age"}


def test_messages_through_its_own_route(server: str) -> None:
    async def ask() -> Any:
        return await litellm.anthropic.messages.acreate(
            model=f"anthropic/{MODEL}", api_base=server, api_key=KEY, messages=HI, max_tokens=16
        )

    message = asyncio.run(ask())
    assert message["content"][0]["type"] == "text" and message["usage"]["output_tokens"] <= 16


def test_embeddings_are_refused_with_the_reason(url: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="makes no embeddings"):
        litellm.embedding(model=f"openai/{MODEL}", api_base=url, api_key=KEY, input=["x"])
