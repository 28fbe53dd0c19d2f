"""The tasks of `eval` against the same figures worked out by hand, from scores and texts of the same engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from narrows.engine.llm import LLM, Piece, Prompt
from narrows.errors import ConfigError
from narrows.evaluate.batches import NUM_DECODE, TEXT_TOKENS, forced_steps, pick_texts
from narrows.evaluate.evaluation import default_files
from narrows.evaluate.tasks import FILES, Setting, Task, make_task
from narrows.sched.sampling import GREEDY
from narrows.sched.scheduler import Limits


@pytest.fixture(scope="module")
def llm(evaluated_model: Path) -> Iterator[LLM]:
    with LLM(evaluated_model, max_context=128) as llm:
        yield llm


def task(llm: LLM, evaluated_model: Path, name: str, file: Path | None = None, **setting: object) -> Task:
    assert llm.tokenizer is not None
    made = Setting(arithmetic_tokens=6, gsm8k_tokens=12, **{"shots": 1, **setting})  # type: ignore[arg-type]
    return make_task(name, file or default_files(str(evaluated_model))[name], llm.tokenizer, 128, made)


def test_every_file_of_the_folder_is_a_task(evaluated_model: Path) -> None:
    assert list(default_files(str(evaluated_model))) == list(FILES)


@pytest.mark.parametrize(("window", "stride"), [(48, 20), (48, 47), (16, 15), (0, 0), (128, 64)])
def test_perplexity_scores_every_token_once_by_the_tokens_of_its_window(
    llm: LLM, evaluated_model: Path, window: int, stride: int
) -> None:
    ids = llm.encode((evaluated_model / "eval" / "heldout.txt").read_text(encoding="utf-8"))
    made = task(llm, evaluated_model, "perplexity", window=window, stride=stride)
    found = made.run(llm, range(len(made)), alone=False)
    window, stride = window or 64, stride or 32
    expected: list[float] = []
    while len(expected) < len(ids) - 1:
        scored = len(expected) + 1
        stop = min(window if scored == 1 else scored + stride, len(ids))
        scores = llm.score([ids[max(0, stop - window) : stop]])[0].prompt_logprobs
        expected += [score.logprob for score in scores[-(stop - scored) :]]
    assert [x for outcome in found for x in outcome.logprobs] == pytest.approx(expected, abs=1e-4)
    assert sum(outcome.num_bytes for outcome in found) == len(ids) - 1, "tokens are bytes here"


def test_alone_is_the_same_items_one_by_one(llm: LLM, evaluated_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_stream = llm.stream
    calls: list[int] = []

    def stream(prompts: Sequence[Prompt], **options: Any) -> Iterator[Piece]:
        calls.append(len(prompts))
        return true_stream(prompts, **options)

    monkeypatch.setattr(llm, "stream", stream)
    for name in FILES:
        made = task(llm, evaluated_model, name, window=48)
        together = made.run(llm, [0, 2, 3], alone=False)
        assert len(calls) == 1 and calls.pop() >= 3
        alone = made.run(llm, [0, 2, 3], alone=True)
        assert set(calls) == {1} and len(alone) == 3
        calls.clear()
        for ours, other in zip(alone, together, strict=True):
            assert (ours.kind, ours.right, ours.answer) == (other.kind, other.right, other.answer)
            assert ours.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_choices_are_made_by_the_sum_and_by_the_sum_per_character(llm: LLM, evaluated_model: Path) -> None:
    made = task(llm, evaluated_model, "choices")
    lines = (evaluated_model / "eval" / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    outcomes = made.run(llm, range(len(made)), alone=False)
    for item, outcome in zip(map(json.loads, lines), outcomes, strict=True):
        sums = []
        for ending in item["endings"]:
            scores = llm.score([f"{item['ctx']} {ending}"])[0].prompt_logprobs
            sums.append(math.fsum(score.logprob for score in scores[-len(f" {ending}".encode()) :]))
        best = sums.index(max(sums))
        norms = [total / len(ending) for total, ending in zip(sums, item["endings"], strict=True)]
        best_norm = norms.index(max(norms))
        assert outcome.answer == (best, best_norm)
        assert outcome.right == {"acc": best == int(item["label"]), "acc_norm": best_norm == int(item["label"])}
    assert len({outcome.answer for outcome in outcomes}) > 1 or outcomes[0].answer[0] != outcomes[0].answer[1]


def test_answers_are_judged_against_the_models_text(llm: LLM, evaluated_model: Path, tmp_path: Path) -> None:
    """The expected answers are the texts that the model gives, but for one."""
    questions = [f"{a} and {a}?" for a in range(4)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [completion.text for completion in llm.generate(chats, max_tokens=6, sampling=GREEDY)]
    assert all(text.strip() for text in texts)
    lines = [{"question": q, "answer": f" {text}\n"} for q, text in zip(questions, texts, strict=True)]
    lines[2]["answer"] += "x"
    file = tmp_path / "arithmetic.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    made = task(llm, evaluated_model, "arithmetic", file)
    found = made.run(llm, range(4), alone=False)
    assert [outcome.right["exact"] for outcome in found] == [True, True, False, True]


def test_gsm8k_as_text_and_as_a_chat(llm: LLM, evaluated_model: Path) -> None:
    assert llm.tokenizer is not None
    plain = task(llm, evaluated_model, "gsm8k", shots=2).texts()
    assert len(plain) == 4
    worked = "Question: Two and 0?\nAnswer: So\n#### 2\n\nQuestion: Two and 1?\nAnswer: So\n#### 3\n\n"
    assert plain[0] == tuple(llm.tokenizer.encode(f"{worked}Question: Two and 2?\nAnswer:"))
    chat = task(llm, evaluated_model, "gsm8k", shots=1, chat=True).texts()
    turns = [("user", "Two and 0?"), ("assistant", "So\n#### 2"), ("user", "Two and 1?")]
    assert len(chat) == 5
    assert chat[0] == tuple(llm.tokenizer.encode_chat([{"role": role, "content": text} for role, text in turns]))


def test_an_answer_without_a_number_is_refused(llm: LLM, evaluated_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text('{"question": "q", "answer": "seven"}\n' * 2, encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: the answer does not end in '#### number'"):
        task(llm, evaluated_model, "gsm8k", file)


# -- fixed steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_fixed_steps_run_known_texts_once_with_their_own_tokens(alone: bool, num_groups: int) -> None:
    limits = Limits(num_groups=num_groups, pages_per_group=41, max_context=64)
    texts = [tuple(range(100 * i, 100 * i + length)) for i, length in enumerate((32, 20, 32, 9, 32, 32, 5, 32))]
    decoded = 0
    groups_met = set()
    seen: dict[int, list[int]] = {}
    for step in forced_steps(texts, limits, alone=alone):
        chunks = [(g, chunk) for g, group in enumerate(step.batch.groups) for chunk in group]
        groups_met |= {group for group, _ in chunks}
        assert step.batch.num_rows == step.batch.num_logit_rows == len(step.text_of_row) == step.merged.num_rows
        assert len({text for text in step.text_of_row}) == 1 or not alone
        row = 0
        for _, chunk in chunks:
            number = step.text_of_row[row]
            text = texts[number]
            for i, token in enumerate(chunk.tokens):
                assert token == text[(chunk.start + i) % len(text)]
            assert chunk.start == len(seen.setdefault(number, []))
            assert max(chunk.pages) < limits.pages_per_group
            seen[number] += chunk.tokens
            row += len(chunk.tokens)
        decoded += step.batch.phase == "decode" and step.batch.num_rows
    assert sorted(seen) == list(range(len(texts))) and groups_met == set(range(num_groups))
    assert decoded >= len(texts) * NUM_DECODE // 3


def test_texts_are_taken_in_turn_and_cut() -> None:
    long, short = [tuple(range(i, i + 90)) for i in range(9)], [(1,), (1, 2, 3)]
    picked = pick_texts([long, short], 100, 64)
    assert [len(text) for text in picked] == [TEXT_TOKENS, TEXT_TOKENS, 3, TEXT_TOKENS]
    assert picked[0] == long[0][:TEXT_TOKENS] and pick_texts([long], 31, 64) == []
    assert len(pick_texts([long], 31, 20)[0]) == 20
