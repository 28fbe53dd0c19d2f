"""LangChain: OpenAI's chats and responses, Anthropic's messages, tools and structured output through all of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from conftest import KEY, MODEL
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    """Somebody."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Ann", "Bob"]  # Anthropic's client turns a maxLength into a sentence of the description
    sign: Literal["ram", "bull"]


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request: pytest.FixtureRequest, server: str) -> Any:
    if request.param == "messages":
        return ChatAnthropic(model=MODEL, base_url=server, api_key=KEY, max_tokens=200, max_retries=0)
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server}/v1",
        api_key=KEY,
        max_tokens=200,
        max_retries=0,
        use_responses_api=request.param == "responses",
    )


def test_a_message_and_its_stream(model: Any) -> None:
    greedy = model.bind(temperature=0)
    whole = greedy.invoke("Hello")
    assert whole.text and whole.usage_metadata["output_tokens"] <= 200
    assert "".join(chunk.text for chunk in greedy.stream("Hello")) == whole.text


def test_a_tool_is_called_and_its_result_sent_back(model: Any, person: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": person}}]
    first = model.bind_tools(tools, tool_choice="add").invoke("Add somebody")
    (call,) = first.tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"name", "age"}
    history = [HumanMessage("Add somebody"), first, ToolMessage("done", tool_call_id=call["id"])]
    assert model.bind_tools(tools).invoke(history) is not None
    chunks = list(model.bind_tools(tools, tool_choice="add").stream("Add somebody"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.tool_calls[0]["name"] == "add" and set(total.tool_calls[0]["args"]) == {"name", "age"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Any, method: str) -> None:
    assert isinstance(model.with_structured_output(Person, method=method).invoke("Who?"), Person)
