"""Figures of fairness: Jain's index, max-min shares, waiting times by client, and a flood that is simulated."""

from __future__ import annotations

import doctest
import itertools
import json
from pathlib import Path

import pytest
from documents import run_for_both
from hypothesis import given
from hypothesis import strategies as st

from narrows.cli.main import main
from narrows.sched.limits import Limits
from narrows.sim.costs import StepCost
from narrows.sim.engine import simulate
from narrows.sim.running_slots import RunningSlots
from narrows.workload import fairness
from narrows.workload.arrivals import Ask, flood, prompt_ids, random_lengths, read_trace
from narrows.workload.arrivals import Prefixes as Shared
from narrows.workload.fairness import by_client, jain, max_min
from narrows.workload.figures import Answer


def test_doctests() -> None:
    result = doctest.testmod(fairness)
    assert result.attempted and not result.failed


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9))
def test_jains_index_lies_between_one_for_all_and_all_for_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


@given(st.integers(0, 60), st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20), min_size=1))
def test_max_min_shares_use_the_total_and_only_satisfied_clients_get_less(total: int, wanted: dict[str, int]) -> None:
    shares = max_min(total, wanted)
    assert sum(shares.values()) == pytest.approx(min(total, sum(wanted.values())))
    for one, other in itertools.permutations(wanted, 2):
        assert shares[one] <= wanted[one] + 1e-9
        assert shares[one] >= shares[other] - 1e-9 or shares[one] == pytest.approx(wanted[one])


def test_slots_count_only_while_clients_compete() -> None:
    held = RunningSlots()
    held.note(1.0, {"a": 4}, {"a": 9})
    held.note(1.0, {"a": 2, "b": 2}, {})
    assert held.jain == 1.0 and held.parts == []
    held.note(1.0, {"a": 4}, {"b": 1})  # b's share is 1 of 4, a's 3
    assert sorted(held.parts) == [0.0, pytest.approx(4 / 3)] and held.jain == pytest.approx(0.5)
    held.note(3.0, {"a": 3, "b": 1}, {"a": 5})
    assert sorted(held.parts) == [pytest.approx(3 / 4), pytest.approx((4 + 9) / (3 + 9))]


def test_waiting_times_are_reported_by_client() -> None:
    asks = [Ask(at_s=0.0, input_tokens=1, output_tokens=1, client=client) for client in ("f", "", "f", "", "f")]
    answers = [Answer(sent_s=0.0, ended_s=n + 2.0, pieces_s=(n + 1.0,), output_tokens=n) for n in range(4)]
    failed = Answer(sent_s=0.0, ended_s=0.0, error="too long")
    many, others = by_client(asks, [*answers, failed])
    assert (many.name, many.clients, many.requests, many.output_tokens, many.ttft_ms.mean) == ("f", 1, 2, 2, 2000)
    assert (others.clients, others.requests, others.output_tokens, others.e2e_ms.mean) == (2, 2, 4, 4000)


def test_a_flood_is_one_clients_texts_of_one_prompt_and_a_trace_may_name_clients(tmp_path: Path) -> None:
    texts = flood(3, 20, 5, at_s=2.0)
    assert len(texts) == 3 and {text.client for text in texts} == {"flood"} and texts[0].at_s == 2.0
    prompts = [prompt_ids(text, number, vocab_size=99) for number, text in enumerate(texts)]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 20
    rows = [{"timestamp": i, "input_length": 9, "output_length": 5} for i in range(2)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, (rows[0] | {"client": "a"}, rows[1]))))
    assert [ask.client for ask in read_trace(tmp_path / "trace", 0, length_scale=2.0)] == ["a", ""]


class EachStep:
    """A second for every step."""

    def cost(self, batch: object) -> StepCost:
        return StepCost(seconds=1.0, parts={("work", "assumed"): 1.0})


@pytest.mark.slow
def test_a_flood_delays_others_only_without_fair_shares() -> None:
    honest = [Ask(at_s=10.0 * n, input_tokens=20, output_tokens=4) for n in range(1, 9)]
    asks = [*honest, *flood(64, 20, 200)]
    limits = Limits(requests_per_group=8)
    fair, unfair = (simulate(limits, EachStep(), asks, fair=fair) for fair in (True, False))
    assert all(answer.ttft_s <= 3.0 for answer in fair.answers[:8]), "the two steps with the ranks, and its own"
    assert all(answer.ttft_s > 1000 for answer in unfair.answers[:8])
    assert fair.fairness is not None and fair.fairness.jain > 0.98 and fair.fairness.clients == 9
    assert unfair.fairness is not None and unfair.fairness.jain < 0.2 and unfair.fairness.least == 0.0
    assert fair.figures.output_tokens == unfair.figures.output_tokens == 8 * 4 + 64 * 200


def test_shares_change_nothing_with_one_request_per_client() -> None:
    asks = random_lengths(30, 20, 30, spread=0.8, prefixes=Shared(count=2, tokens=16))
    limits = Limits(requests_per_group=4, pages_per_group=40)
    fair, unfair = (simulate(limits, EachStep(), asks, fair=fair) for fair in (True, False))
    assert fair == unfair and fair.fairness is None


@pytest.mark.slow
def test_the_command_prints_figures_by_client(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "simulate dsv3-mini --device cpu-core --tp 2 --num-requests 4 --rate 2 --input-length 60 --output-length 5 "
        "--kv-tokens 1600 --flood 40 --flood-input-length 100 --flood-output-length 200"
    )

    def jain_of(more: str) -> float:
        out, found = run_for_both(capsys, [*line.split(), *more.split()])
        assert "others, one request each" in out and "Jain's index" in out
        (one,) = found["candidates"]
        assert [row["requests"] for row in one["fairness"]["by_client"]] == [40, 4]
        return float(one["fairness"]["jain"])

    assert jain_of("") > 0.9 > 0.5 > jain_of("--no-fair-shares")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--flood -1", "--flood is -1; it must be at least 0"),
        ("--flood 3 --flood-output-length 0", "--flood-output-length is 0; it must be at least 1"),
        ("--flood 3 --flood-at nan", "--flood-at is nan; it must be at least 0 seconds"),
        ("--flood 3 --concurrency 2", "leave --concurrency out"),
        ("--flood 3 --max-context 1500", "a text of the flood has 1536 tokens, but the context holds 1500"),
    ],
)
def test_a_flood_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], flags: str, words: str) -> None:
    assert main(f"simulate dsv3-mini --device cpu-core --tp 2 {flags}".split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
