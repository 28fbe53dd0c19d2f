"""Instructor: pydantic models out of chats, by tools, JSON mode and JSON schemas."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from conftest import KEY, MODEL
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    """Somebody."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=8)
    sign: Literal["ram", "bull"]


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_a_model_is_read(url: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=mode)
        found = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Who?"}],
            response_model=Person,
            max_tokens=200,
            max_retries=0,
        )
    assert isinstance(found, Person)
