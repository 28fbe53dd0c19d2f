"""Stop strings that name special tokens, which the text leaves out, and stop strings that stay in the text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import server_lab as lab
from patience import eventually

PATHS = ["/v1/completions", "/v1/chat/completions"]


def ask(of: lab.Lab, path: str, stream: bool, fields: dict[str, Any]) -> tuple[str, str]:
    """The text and why it ended."""
    prompt = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    body = prompt | {"max_tokens": 60} | fields
    if not stream:
        choice = asyncio.run(of.post(path, body)).json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"]
    parts = [event["choices"][0] for event in asyncio.run(of.events(path, body))[:-1]]
    text = "".join(part["text"] if "text" in part else part["delta"].get("content") or "" for part in parts)
    return text, parts[-1]["finish_reason"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        ("<|user|>", "one", "one<|user|>"),
        ("one<|user|> t", "", "one<|user|> t"),
        (["nothing", "two"], "one ", "one two"),
        (["<|assistant|>", " three<|user|>"], "one two", "one two three<|user|>"),
    ],
)
def test_a_special_token_works_as_a_stop_string(
    plain: lab.Lab, path: str, stream: bool, stop: Any, text: str, kept: str
) -> None:
    plain.text = "one<|user|> two three<|user|> four five"
    assert ask(plain, path, stream, {"stop": stop}) == (text, "stop")
    eventually(lambda: plain.backend.num_live == 0)
    for field in ("include_stop_str_in_output", "no_stop_trim"):
        assert ask(plain, path, stream, {"stop": stop, field: True}) == (kept, "stop")
    assert ask(plain, path, stream, {"stop": "user"}) == ("one two three four five", "stop"), "no text of a token"


def test_ignored_end_token_still_matches_a_stop_string(plain: lab.Lab) -> None:
    end = plain.tokenizer.decode([lab.EOS], skip_special_tokens=False)
    assert ask(plain, "/v1/completions", False, {"ignore_eos": True, "max_tokens": 20})[1] == "length"
    assert ask(plain, "/v1/completions", False, {"ignore_eos": True, "stop": end}) == ("Hello world", "stop")
