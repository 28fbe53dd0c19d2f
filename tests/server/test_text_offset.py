"""``text_offset`` is the offset of a token's text, for every prompt, tokenizer and option."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
import server_lab as lab
from hypothesis import given
from hypothesis import strategies as st

from narrows.checkpoints import model_path
from narrows.text import TextStream, Tokenizer, TokenOffsets

DEMO = Tokenizer.from_folder(model_path("narrows-demo"))
TEXTS = st.lists(
    st.sampled_from(["<|user|>", "<|assistant|>", "<|begin|>", " two", "\U0001f9ff", "é", "<|use", " ", "\n"])
    | st.text()
).map("".join)
IDS = st.lists(st.integers(0, 600), max_size=30)


def check(offsets: list[int], ids: list[int], text: str, tokenizer: Tokenizer, left_out: set[int]) -> None:
    assert all(before <= after for before, after in pairwise(offsets)) and all(0 <= at <= len(text) for at in offsets)
    for token, at in zip(ids, offsets, strict=True):
        own = tokenizer.bytes_of(token).decode(errors="replace")
        if token not in left_out and "\ufffd" not in own:
            assert text[at:].startswith(own), (token, at, own, text)


@given(TEXTS)
def test_tokens_of_a_text_that_a_client_wrote(text: str) -> None:
    ids = DEMO.encode(text)
    offsets = TokenOffsets(DEMO, text=text)
    assert DEMO.added_around == (1, 0) and offsets.here == 0, "bos, which the text has not"
    check([offsets.push(token) for token in ids[1:]], ids[1:], text, DEMO, set())


@given(IDS, st.booleans(), st.integers(0, 20))
def test_tokens_of_the_text_that_ids_decode_to(ids: list[int], skip: bool, start: int) -> None:
    text = "x" * start + DEMO.decode(ids, skip_special_tokens=skip)
    offsets = TokenOffsets(DEMO, start=start, skip_special_tokens=skip)
    special = set(DEMO.special_tokens.values()) if skip else set()
    check([offsets.push(token) for token in ids], ids, text, DEMO, special)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "prompt", ["<|user|>What is 1 + 1?<|assistant|>2", "ok", "\U0001f9ff!", [2, 70, 80, 2, 90], "<|begin|>two"]
)
@pytest.mark.parametrize("stop", [None, "wor", "<|user|>"])
def test_offsets_of_an_answer_with_its_prompt(
    plain: lab.Lab, prompt: Any, skip: bool, stream: bool, stop: str | None
) -> None:
    plain.text = "Hello \U0001f9ff<|user|> world"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 40, "skip_special_tokens": skip, "stop": stop}
    if stream:
        parts = [event["choices"][0] for event in asyncio.run(plain.events("/v1/completions", body))[:-1]]
    else:
        parts = asyncio.run(plain.post("/v1/completions", body)).json()["choices"]
    text = "".join(part["text"] for part in parts)
    columns = [part["logprobs"] for part in parts if part["logprobs"]]
    tokens = [token for each in columns for token in each["tokens"]]
    offsets = [at for each in columns for at in each["text_offset"]]
    written = prompt if isinstance(prompt, str) else plain.tokenizer.decode(prompt, skip_special_tokens=skip)
    assert text.startswith(written) and offsets == sorted(offsets) and len(offsets) > 5
    given = len(plain.tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
    for index, (token, at) in enumerate(zip(tokens, offsets, strict=True)):
        spelled = token.startswith("<|") and not (isinstance(prompt, str) and 0 < index < given)
        gone = token.startswith("bytes:") or (spelled and (skip or index == 0 or token == "<|end|>"))
        if not gone and at + len(token) <= len(text):
            assert text[at:].startswith(token), (index, token, at, text)
    first = next(at for index, at in enumerate(offsets) if index == given)
    assert first == len(written), "the continuation begins where the prompt ends"


def test_byte_tokens_whose_run_is_settled_late() -> None:
    class Bytes:
        """Ids are bytes and byte tokens, as sentencepiece falls back to; 256 is a word."""

        def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
            out = b""
            for token in ids:
                out += b" the" if token == 256 else bytes([token])
            return out.decode(errors="replace")

        def is_silent(self, token: int, *, skip_special_tokens: bool = True) -> bool:
            return False

        def is_special(self, token: int) -> bool:
            return False

        def is_byte(self, token: int) -> bool:
            return token < 256

        def bytes_of(self, token: int) -> bytes:
            return b" the" if token == 256 else bytes([token])

    tokenizer: Any = Bytes()
    ids = [*"é".encode(), ord("A"), 256, *"\U0001f9ff".encode(), 256]
    offsets = TokenOffsets(tokenizer)
    assert [offsets.push(token) for token in ids] == [0, 0, 1, 2, 6, 6, 6, 6, 7]
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == "éA the\U0001f9ff the"
