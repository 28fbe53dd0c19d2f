"""Generated ids to text with stop strings and special tokens spelled out; the bytes of single tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.checkpoints import model_path
from narrows.text import GeneratedText, GenerationConfig, Tokenizer

TOKENIZER = Tokenizer.from_folder(model_path("narrows-demo"))


@given(st.text())
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(TOKENIZER.bytes_of(token) for token in ids).decode() == TOKENIZER.decode(ids)


def test_the_bytes_of_a_special_token_are_its_name_and_an_unknown_id_has_none() -> None:
    assert TOKENIZER.bytes_of(TOKENIZER.id_of("<|user|>")) == b"<|user|>"
    assert TOKENIZER.bytes_of(10**6) == b""


def test_special_tokens_are_left_out_except_spelled_ones() -> None:
    user, assistant = TOKENIZER.id_of("<|user|>"), TOKENIZER.id_of("<|assistant|>")
    ids = [*TOKENIZER.encode("one", add_special_tokens=False), user, assistant]
    ids += TOKENIZER.encode(" two", add_special_tokens=False)
    text = GeneratedText(TOKENIZER, spelled_out={user})
    pieces = [text.push(token) for token in ids] + [text.finish()]
    assert "".join(pieces) == text.text == "one<|user|> two"


def test_a_stop_string_ends_the_text() -> None:
    text = GeneratedText(TOKENIZER, stop=("c d",), end_ids={1})
    for token in TOKENIZER.encode("a b c d e", add_special_tokens=False):
        text.push(token)
    assert text.stopped and text.text == "a b "
    assert text.push(1) == text.finish() == ""


USER = TOKENIZER.id_of("<|user|>")


def written(ids: list[int], **how) -> GeneratedText:
    text = GeneratedText(TOKENIZER, **how)
    pieces = [text.push(token) for token in ids] + [text.finish()]
    assert "".join(pieces) == text.text
    return text


@pytest.mark.parametrize("stop", ["<|user|>", "one<|user|>", "<|user|> two", "e<|user|> t", "ne<|user|><|user|>"])
@pytest.mark.parametrize("how", [{}, {"skip_special_tokens": False}, {"spelled_out": {USER}}])
@pytest.mark.parametrize("as_tokens", [True, False])
def test_a_stop_string_with_a_special_token_in_it_stops_there(stop: str, how, as_tokens: bool) -> None:
    source = "one<|user|><|user|> two three" if stop.endswith("><|user|>") else "one<|user|> two three"
    ids = encoded(source, as_tokens)
    text = written(ids, stop=(stop, "never"), **how)
    assert text.stopped and text.stop_string == stop
    assert text.text == source[: source.index(stop)]
    kept = written(ids, stop=(stop,), keep_stop=True, **how)
    assert kept.text == source[: source.index(stop) + len(stop)]


def encoded(source: str, as_tokens: bool) -> list[int]:
    """The ids of a text whose special tokens are such, or are spelled by ordinary tokens."""
    pieces = (
        [source] if as_tokens else [piece for whole in source.split("<|user|>") for piece in (whole, "<|", "user|>")]
    )
    pieces = pieces if as_tokens else pieces[:-2]
    return [token for piece in pieces for token in TOKENIZER.encode(piece, add_special_tokens=False)]


def test_special_tokens_outside_stop_strings_end_no_text() -> None:
    ids = TOKENIZER.encode("a<|assistant|>b<|user|>c", add_special_tokens=False)
    assert written(ids, stop=("<|user|>d", "user", "<|user", "\ud800", "ab<|user|>x")).text == "abc"
    found = written(ids, stop=("<|user|>c",))
    assert found.text == "ab"


def test_half_of_a_surrogate_pair_stops_nothing() -> None:
    ids = TOKENIZER.encode("a<|user|>b", add_special_tokens=False)
    assert written(ids, stop=("\ud800", "<|user|>x")).text == "ab"


def test_the_checkpoints_sampling_settings_are_used() -> None:
    greedy = GenerationConfig(do_sample=False, temperature=0.7, repetition_penalty=1.5)
    assert greedy.sampling(samples_by_default=True) == {"repetition_penalty": 1.5}
    sampled = GenerationConfig(do_sample=True, top_k=20)
    assert sampled.sampling(samples_by_default=False) == {"temperature": 1.0, "top_k": 20}
