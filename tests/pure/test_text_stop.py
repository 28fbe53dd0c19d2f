"""Stop strings: any cutting of a text into pieces gives the result of the whole text; nothing is given too early."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.text.stream import StopStrings

LETTERS = st.text("ab<|", max_size=24)
STOPS = st.lists(st.text("ab<|", min_size=1, max_size=5), max_size=4).map(tuple)


def searched(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The rule by brute force: the first prefix that ends in a stop string, without the longest one that it ends in."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def streamed(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    given = ""
    for piece in pieces:
        given += stop.push(piece)
    return given + stop.finish(), stop.found


@given(text=LETTERS, stops=STOPS, cuts=st.sets(st.integers(0, 24)))
@example(text="ab<|", stops=("b<", "ab<|"), cuts={3})  # the long one begins first, the short one ends first
@example(text="aab", stops=("b", "ab"), cuts={2})  # both end together
def test_any_split_equals_a_search_of_the_whole_text(text: str, stops: tuple[str, ...], cuts: set[int]) -> None:
    at = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(at)]
    assert streamed(pieces, stops) == streamed([text], stops) == streamed(list(text), stops) == searched(text, stops)


@given(text=LETTERS, stops=STOPS)
def test_only_text_that_may_become_a_stop_string_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    stop = StopStrings(stops)
    given = ""
    for i, letter in enumerate(text):
        given += stop.push(letter)
        if stop.found:
            break
        held = text[len(given) : i + 1]
        assert text[: i + 1] == given + held
        assert not held or any(s.startswith(held) and s != held for s in stops)
    assert searched(text, stops)[0].startswith(given)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one E", "N", "D two"], ("END",), ["one ", "", ""]),
        (["one E", "N", "TER"], ("END",), ["one ", "", "ENTER"]),
        (["a", "a", "a", "b"], ("aab",), ["", "", "a", ""]),  # the held text moves on by one, not by all
        (["<|im", "_e", "nd|>"], ("<|im_end|>", "<|im_start|>"), ["", "", ""]),
        (["x<|im_s", "top"], ("<|im_end|>", "<|im_start|>"), ["x", "<|im_stop"]),
        (["néw\n", "\nline"], ("\n\n",), ["néw", ""]),
        (["all of it"], (), ["all of it"]),
    ],
)
def test_pieces(pieces: list[str], stops: tuple[str, ...], expected: list[str]) -> None:
    stop = StopStrings(stops)
    assert [stop.push(piece) for piece in pieces] == expected


def test_after_a_stop_nothing_more_is_given() -> None:
    stop = StopStrings(("b",))
    assert (stop.push("ab"), stop.found) == ("a", True)
    assert (stop.push("more a"), stop.finish()) == ("", "")


def test_held_text_is_emitted_once_at_the_end() -> None:
    stop = StopStrings(("END",))
    assert (stop.push("the EN"), stop.finish(), stop.finish(), stop.found) == ("the ", "EN", "", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stop string is empty"):
        StopStrings(("END", ""))
