"""The parts of `eval` that need no engine: answers, files, statistics, and scores against one rank."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.evaluate.answers import flexible_number, gsm8k_prompt, hellaswag_text, same_number, strict_number
from narrows.evaluate.compare import LEAST_NATS, Outcome, score_of
from narrows.evaluate.items import read_choices, read_questions, read_text
from narrows.evaluate.statistics import SIGMAS, binomial_error, clustered_mean, paired_p_value, significance

# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7", "7"),
        ("#### 7\nQuestion: what is 9?", "7", "9"),
        ("#### -1,234.50 dollars", "-1234.50", "-1234.50"),
        ("#### $18.", "18", "18"),
        ("The answer is $2,000.", None, "2000"),
        ("-$5 is left", None, "-5"),
        ("#### none, but 3", None, "3"),
        ("no number at all", None, None),
        ("", None, None),
    ],
)
def test_the_number_of_an_answer(text: str, strict: str | None, flexible: str | None) -> None:
    assert (strict_number(text), flexible_number(text)) == (strict, flexible)


@given(st.integers(-(10**9), 10**9), st.text("ab c\n", max_size=20))
def test_numbers_are_found_in_every_notation(number: int, around: str) -> None:
    for written in (str(number), f"{number:,}", f"{number}.0"):
        assert same_number(strict_number(f"{around}#### {written}\n{around}"), str(number))
        assert same_number(flexible_number(f"{around} {written} {around}"), str(number))


@pytest.mark.parametrize(("first", "second"), [("7", None), (None, None), ("7", "8"), ("1.2.3", "1.2")])
def test_different_or_missing_numbers_are_unequal(first: str | None, second: str | None) -> None:
    assert not same_number(first, second)


def test_the_gsm8k_prompt_ends_where_the_answer_begins() -> None:
    prompt = gsm8k_prompt([("a?", "b #### 1"), ("c?", "d #### 2")], "e?")
    assert prompt == "Question: a?\nAnswer: b #### 1\n\nQuestion: c?\nAnswer: d #### 2\n\nQuestion: e?\nAnswer:"
    assert gsm8k_prompt([], "e?") == "Question: e?\nAnswer:"


def test_hellaswag_marks_are_removed_and_titles_become_sentences() -> None:
    assert hellaswag_text("[header] How to [title] Begin [step] Do  it [substeps] now.") == "How to. Begin Do it now."
    assert hellaswag_text(" plain text ") == "plain text"


# -- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, *items: object) -> Path:
    file = folder / "items.jsonl"
    text = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in items)
    file.write_text(text, encoding="utf-8")
    return file


def test_questions_as_published_and_with_kinds(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "1 + 1 =", "answer": 2, "kind": "+"}, "", {"question": "q", "answer": "#### 3"})
    first, second = read_questions(file)
    assert (first.question, first.answer, first.kind, first.line) == ("1 + 1 =", "2", "+", 1)
    assert (second.answer, second.kind, second.line) == ("#### 3", "", 3)


def test_choices_as_published(tmp_path: Path) -> None:
    published = {
        "activity_label": "Roof work",
        "ctx_a": "A man is on a roof.",
        "ctx_b": "he",
        "ctx": "A man is on a roof. he",
        "endings": ["starts [step] pulling.", "sits."],
        "label": "1",
    }
    plain = {"ctx": "Two and two make", "endings": ["four", "five", "six"], "label": 0}
    first, second = read_choices(write(tmp_path, published, plain))
    assert first.ctx == "Roof work: A man is on a roof. He" and first.endings == ("starts pulling.", "sits.")
    assert (first.label, second.label, second.ctx) == (1, 0, "Two and two make")


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("{nonsense", "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object, not list"),
        ({"question": "q"}, "line 2: needs the text 'answer' (it has: question)"),
        ({"question": " ", "answer": "1"}, "line 2: needs the text 'question'"),
        ({"question": "q", "answer": True}, "line 2: needs the text 'answer'"),
    ],
)
def test_a_wrong_question_is_named_with_its_line(tmp_path: Path, item: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_questions(write(tmp_path, {"question": "q", "answer": "a"}, item))
    assert says in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"endings": ["one"]}, "at least 2 texts"),
        ({"endings": "ab"}, "at least 2 texts"),
        ({"endings": ["one", ""]}, "at least 2 texts"),
        ({"label": 2}, "'label' must be 0 to 1, not 2"),
        ({"label": -1}, "'label' must be 0 to 1, not -1"),
        ({"label": None}, "'label' must be 0 to 1, not None"),
        ({"label": True}, "'label' must be 0 to 1, not True"),
        ({"ctx": ""}, "needs the text 'ctx'"),
    ],
)
def test_wrong_choices_are_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_choices(write(tmp_path, {"ctx": "c", "endings": ["one", "two"], "label": 1} | changes))
    assert f"line 1: {says}" in str(error.value) or says in str(error.value)


def test_empty_missing_and_binary_texts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(file)
    file.write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        read_text(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(file)


# -- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=5, max_size=40))
def test_without_clusters_the_error_is_the_standard_error_of_a_mean(values: list[float]) -> None:
    mean = clustered_mean(values, range(len(values)))
    assert mean.value == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert mean.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_repeated_values_within_a_cluster_do_not_shrink_the_error() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    once = clustered_mean(values, range(5))
    ten_times = clustered_mean([v for v in values for _ in range(10)], [i for i in range(5) for _ in range(10)])
    assert ten_times.error == pytest.approx(once.error) and ten_times.value == once.value
    assert clustered_mean(values, [0, 0, 1, 2, 3]).error == math.inf, "4 clusters tell nothing"
    assert clustered_mean([], []).error == math.inf


def test_chance_rarely_passes_the_threshold() -> None:
    """Normal noise in clusters: z has a standard deviation of about 1."""
    draw = random.Random(7)
    scores = []
    for _ in range(300):
        shifts = [draw.gauss(0, 1) for _ in range(30)]
        mean = clustered_mean(
            [shift + draw.gauss(0, 1) for shift in shifts for _ in range(8)], [i // 8 for i in range(240)]
        )
        scores.append(mean.value / mean.error)
    assert 0.9 < statistics.pstdev(scores) < 1.15 and abs(statistics.fmean(scores)) < 0.2


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_paired_test_is_the_two_sided_binomial(gained: int, lost: int) -> None:
    count = gained + lost
    tail = sum(math.comb(count, k) / 2**count for k in range(min(gained, lost) + 1))
    assert paired_p_value(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert paired_p_value(gained, lost) == paired_p_value(lost, gained) <= 1.0


@pytest.mark.slow
def test_errors_of_shares_and_the_one_threshold() -> None:
    assert binomial_error(0.5, 100) == pytest.approx(0.05) and math.isnan(binomial_error(0.5, 0))
    assert significance() == pytest.approx(6.334e-5, rel=1e-3) and SIGMAS == 4.0
    assert paired_p_value(0, 5000) < significance() < paired_p_value(2450, 2550), "thousands of items do not overflow"


# -- scores ----------------------------------------------------------------------------------------------------------


def answers(right: list[bool], kind: str = "") -> list[Outcome]:
    return [Outcome(kind=kind, right={"exact": r}, answer=(int(r),)) for r in right]


def test_shares_by_kind_and_changes_against_one_rank() -> None:
    ours = answers([True, False, True], "a") + answers([True], "b")
    its = answers([True, True, False], "a") + answers([True], "b")
    score = score_of("arithmetic", ours, its, alone=False)
    share = score.shares["exact"]
    assert (share.share, share.gained, share.lost, score.same) == (0.75, 1, 1, 0.5)
    assert {kind: found.share for kind, found in score.kinds.items()} == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert score.failure == ""
    alone = score_of("arithmetic", its, None, alone=True)
    assert alone.same is None and alone.shares["exact"].lost == 0 and alone.failure == ""


def test_items_lost_beyond_chance_are_a_failure() -> None:
    its = answers([True] * 40)
    assert score_of("t", answers([True] * 26 + [False] * 14), its, alone=False).failure == ""
    lost = score_of("t", answers([True] * 25 + [False] * 15), its, alone=False)
    assert lost.failure.startswith("exact: 15 items that one rank has right are wrong here, 0 the other way")


def text(shift: float, windows: int = 12, noise: float = 0.0) -> list[Outcome]:
    draw, more = random.Random(3), random.Random(4)
    return [
        Outcome(
            logprobs=tuple(-2.0 + draw.gauss(0, 1) - shift + more.gauss(0, noise) for _ in range(50)),
            num_bytes=100,
            num_words=20,
        )
        for _ in range(windows)
    ]


def test_perplexity_per_token_word_and_byte() -> None:
    outcomes = [Outcome(logprobs=(-1.0, -3.0), num_bytes=8, num_words=1)] * 6
    found = score_of("perplexity", outcomes, None, alone=False).perplexity
    assert found is not None and found.num_tokens == 12 and found.more_nats is None
    assert found.perplexity == pytest.approx(math.exp(2)) and found.word_perplexity == pytest.approx(math.exp(4))
    assert found.bits_per_byte == pytest.approx(24 / math.log(2) / 48)


def test_a_perplexity_change_beyond_its_noise_is_a_failure() -> None:
    one = text(0.0)
    assert score_of("p", text(0.0, noise=0.05), one, alone=False).failure == ""
    assert score_of("p", text(LEAST_NATS / 2), one, alone=False).failure == "", "certain, and too small to count"
    assert "nats less likely" in score_of("p", text(0.02, noise=0.05), one, alone=False).failure
    assert "nats more likely" in score_of("p", text(-0.02, noise=0.05), one, alone=False).failure
    broken = [Outcome(logprobs=(math.nan,) * 50, num_bytes=100, num_words=20)] * 12
    assert "not numbers" in score_of("p", broken, one, alone=False).failure
