"""The recipe of narrows-demo without training: problems, held-out facts, vocabulary, files on disk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from narrows.text.tokenizer import Tokenizer

RECIPE = Path(__file__).parents[2] / "examples" / "train_demo"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe's files import one another by their bare names, as scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(RECIPE))
    yield
    for name in set(sys.modules) - before:
        if str(RECIPE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("recipe")
def test_training_states_no_held_out_fact_in_any_order_or_phrase():
    import problems  # noqa: PLC0415

    def unordered(sign: str, a: int | str, b: int | str) -> tuple[str, frozenset[int]]:
        return sign, frozenset((int(a), int(b)))

    stated = set()
    for seed in range(6000):
        problem = problems.draw(Random(seed))
        text = f"{problem.question} {problem.answer}".replace("plus", "+").replace("minus", "-")
        stated |= {unordered(sign, a, b) for a, sign, b in re.findall(r"(\d+) ([+-]) (\d+)", text)}
        if problem.kind == "comparison":
            stated.add(unordered("<", *re.findall(r"\d+", problem.question)))
    asked = {known for seed in range(2000) for known in problems.draw(Random(seed), held_out=True).facts}
    held_out = {unordered(*known) for known in asked if problems.is_held_out(known)}
    assert len(stated) > 3000 and len(held_out) > 500 and not stated & held_out


@pytest.mark.usefixtures("recipe")
def test_every_answer_is_right():
    import problems  # noqa: PLC0415

    kinds = set()
    for seed in range(2000):
        problem = problems.draw(Random(seed))
        kinds.add(problem.kind)
        a, b, *more = map(int, re.findall(r"\d+", problem.question))
        if problem.kind == "word problem":
            assert re.search(r"#### (\d+)$", problem.answer).group(1) == str(a + b - more[0])
        elif problem.kind == "comparison":
            assert int(problem.answer) == (max if "larger" in problem.question else min)(a, b)
        else:
            assert int(problem.answer) == (a + b if "addition" in problem.kind else a - b)
    assert len(kinds) == len(problems.KINDS)


@pytest.mark.usefixtures("recipe")
def test_choices_have_one_right_ending_and_three_of_other_pieces():
    import export  # noqa: PLC0415

    pieces = [" ".join(f"{name}{i}" for i in range(200)) for name in "abcdefg"]
    items = list(export._choices({"letters": pieces}, Random(0)))
    assert len(items) > 20
    for item in items:
        letters = [ending[0] for ending in item["endings"]]
        assert len(set(letters)) == 4 and item["ctx"][0] == letters[item["label"]]


@pytest.mark.usefixtures("recipe")
def test_a_run_cut_off_leaves_no_step_twice_in_the_curve(tmp_path: Path):
    import train  # noqa: PLC0415

    curve = tmp_path / "curve.csv"
    curve.write_text("180,1.0,1.1,9\n200,0.9,1.1,9\n220,0.8,1.1,9\n")
    train._cut_curve(curve, 200)
    assert curve.read_text() == "180,1.0,1.1,9\n200,0.9,1.1,9\n"


@pytest.mark.usefixtures("recipe")
def test_no_token_holds_two_digits_and_chat_marks_are_single_tokens(tmp_path: Path):
    import vocabulary  # noqa: PLC0415

    texts = ["In 1946 and 1947 there were 1946 ships and 1947 men."] * 200
    trained = vocabulary.train(texts)
    assert not [token for token in trained.get_vocab() if len(re.findall(r"\d", token)) > 1]
    vocabulary.save(trained, tmp_path)
    ids = Tokenizer.from_folder(tmp_path).encode_chat([{"role": "user", "content": "What is 27 + 58?"}])
    marks = [trained.token_to_id(mark) for mark in (vocabulary.BOS, vocabulary.USER, vocabulary.ASSISTANT)]
    assert [ids[0], ids[1], ids[-1]] == marks and trained.decode(list(ids)).count("27 + 58") == 1
