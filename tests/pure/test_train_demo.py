"""The recipe of narrows-demo, as far as it needs no training: its problems, what is held out, its vocabulary."""

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
def test_held_out_numbers_are_never_trained_on_in_any_phrase():
    import problems  # noqa: PLC0415

    trained = {(p.kind, p.numbers) for p in (problems.draw(Random(seed)) for seed in range(4000))}
    held_out = {(p.kind, p.numbers) for p in (problems.draw(Random(seed), held_out=True) for seed in range(4000))}
    assert len(held_out) > 100 and not trained & held_out


@pytest.mark.usefixtures("recipe")
def test_every_answer_is_right():
    import problems  # noqa: PLC0415

    kinds = set()
    for seed in range(2000):
        problem = problems.draw(Random(seed))
        kinds.add(problem.kind)
        a, b, *more = problem.numbers
        if problem.kind == "word problem":
            assert re.search(r"#### (-?\d+)$", problem.answer).group(1) == str(a + b - more[0])
        elif problem.kind == "comparison":
            assert int(problem.answer) == (max if "larger" in problem.question else min)(a, b)
        else:
            assert int(problem.answer) == (a + b if "addition" in problem.kind else a - b)
    assert len(kinds) == len(problems.KINDS)


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
