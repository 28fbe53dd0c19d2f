"""Loads and their figures: seeds repeat, arrivals have their rate, traces are read, percentiles are numpy's."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.workload.arrivals import Prefixes, arrive, fitted, prompt_ids, random_lengths, read_trace
from narrows.workload.figures import Answer, Latency, figures, percentile


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.99), st.integers(0, 5))
def test_lengths_stay_within_their_spread_and_seeds_repeat(
    count: int, given_tokens: int, made: int, spread: float, seed: int
) -> None:
    prefixes = Prefixes(count=3, tokens=7)
    asks = random_lengths(count, given_tokens, made, spread=spread, seed=seed, prefixes=prefixes)
    assert asks == random_lengths(count, given_tokens, made, spread=spread, seed=seed, prefixes=prefixes)
    for ask in asks:
        assert given_tokens * (1 - spread) - 1e-6 <= ask.input_tokens - 7 <= max(given_tokens * (1 + spread), 1)
        assert made * (1 - spread) - 1e-6 <= ask.output_tokens <= max(made * (1 + spread), 1)
        assert ask.blocks[0][0] in range(3)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_their_rate_and_regularity(burstiness: float) -> None:
    asks = arrive(random_lengths(4000, 5, 5, prefixes=Prefixes()), 20.0, burstiness=burstiness, seed=3)
    times = [ask.at_s for ask in asks]
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times) and statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    # A gamma distribution of shape b has a coefficient of variation of b ** -0.5.
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)


def test_prompts_share_the_requested_prefixes() -> None:
    asks = random_lengths(30, 9, 1, prefixes=Prefixes(count=2, tokens=20))
    prompts = [prompt_ids(ask, i, vocab_size=100, seed=4) for i, ask in enumerate(asks)]
    assert all(len(prompt) == 29 and set(prompt) <= set(range(100)) for prompt in prompts)
    assert (
        len({tuple(prompt[:20]) for prompt in prompts}) == 2 and len({tuple(prompt[20:]) for prompt in prompts}) == 30
    )
    assert (
        prompts[3] == prompt_ids(asks[3], 3, vocab_size=100, seed=4) != prompt_ids(asks[3], 3, vocab_size=100, seed=5)
    )


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,4000,109
"""


def test_both_kinds_of_traces(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(AZURE)
    first, second = read_trace(file, 0, speed=2.0, length_scale=0.5)
    assert (first.at_s, first.input_tokens, first.output_tokens) == (0.0, 187, 22)
    assert second.at_s == pytest.approx(2.0) and second.input_tokens == 2000
    assert len(read_trace(file, 1)) == 1
    longest = fitted(read_trace(file, 0), 1000)[1]
    assert longest.output_tokens == 109 and longest.input_tokens == 891
    rows = [
        {"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 100, "input_length": 700, "output_length": 3, "hash_ids": [7]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    early, late = read_trace(file, 0)  # by time, whatever their order in the file
    assert (early.at_s, early.input_tokens) == (0.0, 700) and late.at_s == pytest.approx(0.4)
    prompts = {ask.input_tokens: prompt_ids(ask, i, vocab_size=50) for i, ask in enumerate((early, late))}
    assert prompts[1100][:512] == prompts[700][:512] and prompts[1100][512:700] != prompts[700][512:]


def test_times_of_a_trace_may_name_their_zone(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    times = ("2023-11-16 18:15:46.97+00:00", "2023-11-16 18:15:47.9700000", "2023-11-16T20:15:48.97+02:00")
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{at},5,5\n" for at in times))
    assert [ask.at_s for ask in read_trace(file, 0)] == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("a,b\n1,2\n", "needed are TIMESTAMP"),
        (AZURE + "yesterday,1,2\n", "line 4"),
        (AZURE + "2023-11-16 18:15:46,x,2\n", "line 4"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"timestamp": 1}\n', "line 2"),
        ('{"timestamp": 1,\n', "line 1"),
        ('{"timestamp": 1, "input_length": 1}\n', "line 1.*there is no output_length"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "line 1.*the time is nan"),
        ('{"timestamp": Infinity, "input_length": 1, "output_length": 1}\n', "line 1.*the time is inf"),
        ('{"timestamp": 1, "input_length": 1e400, "output_length": 1}\n', "line 1.*infinity"),
        (AZURE + "2023-11-16 18:15:46\n", "line 4.*there is no ContextTokens"),
        (AZURE + "2023-11-16 18:15:46,-5,2\n", "line 4.*-5 tokens in and 2 out; each must be at least 1"),
        (AZURE + "2023-11-16 18:15:46,5,0\n", "line 4.*5 tokens in and 0 out; each must be at least 1"),
    ],
)
def test_unreadable_traces_are_errors_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / "trace", 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none", 0)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=60))
def test_percentiles_equal_the_statistics_modules(values: list[float]) -> None:
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    for q in (50, 90, 99):
        assert percentile(ordered, q) == pytest.approx(cuts[q - 1])
    assert Latency.of(values).mean == pytest.approx(1e3 * statistics.fmean(values))


def test_figures_follow_their_definitions() -> None:
    answers = [
        Answer(
            sent_s=10.0, ended_s=13.0, pieces_s=(11.0, 11.5, 12.5), input_tokens=7, output_tokens=3, cached_tokens=4
        ),
        Answer(sent_s=12.0, ended_s=14.0, pieces_s=(13.0,), input_tokens=5, output_tokens=1),
        Answer(sent_s=12.5, ended_s=12.6, error="HTTP 429: full"),
    ]
    found = figures(answers)
    assert (found.completed, found.failed, found.errors) == (2, 1, {"HTTP 429: full": 1})
    assert found.duration_s == 4.0 and found.request_throughput == 0.5
    assert found.output_throughput == 1.0 and found.total_throughput == 4.0 and found.cached_tokens == 4
    assert found.ttft_ms.mean == 1000 and found.tpot_ms.mean == 750 and found.itl_ms.mean == 750
    assert found.e2e_ms.median == 2500 and found.peak_concurrency == 3
    assert figures([]).completed == 0
