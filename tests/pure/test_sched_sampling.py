"""Sampling parameters, what they refuse, and the random stream: a function of (seed, position), and uniform."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from narrows.errors import ConfigError
from narrows.sched.batch import Batch, Chunk
from narrows.sched.sampling import GREEDY, MAX_LOGPROBS, SamplingParams, uniform

RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_range_ends_are_allowed_and_values_beyond_are_refused_with_numbers(name: str) -> None:
    low, high = RANGES[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - 1, high + 1, math.inf, -math.inf, math.nan):
        with pytest.raises(ConfigError) as error:
            SamplingParams(**{name: value})
        assert str(error.value) == f"{name} is {value:g}; it must be between {low:g} and {high:g}"


def test_another_seed_changes_nothing_else_and_checks_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """n texts share a bias that may name every token."""
    first = SamplingParams(temperature=1.0, seed=1, logit_bias=((3, 1.5), (4, -2.0)))
    expected = replace(first, seed=9)
    monkeypatch.setattr(SamplingParams, "_check_bias", lambda _: pytest.fail("checked again"))
    other = first.with_seed(9)
    assert other == expected and other.logit_bias is first.logit_bias and first.seed == 1


def test_top_p_0_is_refused_because_it_keeps_no_token() -> None:
    with pytest.raises(ConfigError, match=r"top_p is 0; it must be between 1e-09 and 1"):
        SamplingParams(top_p=0.0)


def test_errors_of_top_k_and_logprobs_give_the_range() -> None:
    with pytest.raises(ConfigError, match=r"top_k is -1; it must be at least 0 \(0 keeps all tokens\)"):
        SamplingParams(top_k=-1)
    for count in (-1, MAX_LOGPROBS + 1):
        with pytest.raises(ConfigError, match=f"logprobs is {count}; it must be between 0 and {MAX_LOGPROBS}"):
            SamplingParams(logprobs=count)
    assert SamplingParams(logprobs=0).needs_logits, "0 asks for the chosen token's alone"
    assert SamplingParams(logprobs=MAX_LOGPROBS, top_k=10**9).top_k == 10**9


def test_which_requests_need_whole_rows_of_logits() -> None:
    assert not GREEDY.needs_logits
    assert not SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=3).needs_logits, "without a temperature it is greedy"
    assert SamplingParams(temperature=0.1).needs_logits and not SamplingParams(temperature=0.1).penalizes
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.5), ("frequency_penalty", 0.5)):
        params = SamplingParams(**{name: value})
        assert params.needs_logits and params.penalizes


def test_a_batch_needs_logits_only_if_a_sampled_row_does() -> None:
    def batch(**chunk: object) -> Batch:
        params = SamplingParams(temperature=1.0)
        return Batch(groups=((), (Chunk(request=0, start=0, tokens=(1, 2), pages=(1,), sampling=params, **chunk),)))  # type: ignore[arg-type]

    assert batch(num_logits=1).needs_logits
    assert not batch(num_logits=0).needs_logits, "a chunk in the middle of a prompt"


def test_scored_rows_need_logits_and_the_one_left_over_is_sampled() -> None:
    scored = SamplingParams(prompt_logprobs=0)
    assert scored.needs_logits
    with pytest.raises(ConfigError, match="prompt_logprobs is 21; it must be between 0 and 20"):
        SamplingParams(prompt_logprobs=21)

    def chunk(number: int, tokens: tuple[int, ...], targets: tuple[int, ...], num_logits: int) -> Chunk:
        return Chunk(
            request=number, start=0, tokens=tokens, pages=(1,), sampling=scored, targets=targets, num_logits=num_logits
        )

    middle, last, plain = chunk(4, (1, 2, 3), (2, 3, 9), 3), chunk(5, (1, 2, 3), (2, 3), 3), chunk(6, (1, 2), (), 1)
    batch = Batch(groups=((plain, middle), (last,)))
    assert batch.needs_logits and batch.samples() == ((6, 0), (5, 6))
    assert batch.scored() == ((4, range(1, 4)), (5, range(4, 6)))
    with pytest.raises(AssertionError, match="a row that is scored has logits"):
        chunk(7, (1, 2), (2, 3), 1)


# -- the stream ------------------------------------------------------------------------------------------------------


def test_the_stream_is_a_function_of_seed_and_position_alone() -> None:
    grid = [(seed, position) for seed in (0, 1, 7, 2**63 - 1, -1) for position in (0, 1, 5, 2**20)]
    forwards = {key: uniform(*key) for key in grid}
    assert forwards == {key: uniform(*key) for key in reversed(grid)}
    assert len(set(forwards.values())) == len(grid)


def splitmix64(state: int) -> int:
    """The first output of splitmix64 for a seed, as published (java.util.SplittableRandom's)."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_pinned_values() -> None:
    """A seed gives the same text in every later version."""
    assert splitmix64(1234567) == 6457827717110365317  # the published test vector
    for seed, position, value in (
        (0, 0, 0.6524484863740322),
        (0, 1, 0.03401170130434639),
        (1, 0, 0.36818951565166946),
        (42, 1000, 0.6647172998076323),
    ):
        assert uniform(seed, position) == value
        assert value == (splitmix64(splitmix64(seed) ^ position) >> 11) / 2**53


def test_another_process_gives_the_same_numbers() -> None:
    code = "from narrows.sched.sampling import uniform; print([uniform(3, p).hex() for p in range(4)])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([uniform(3, p).hex() for p in range(4)])


def test_random_numbers_lie_in_0_to_1_exclusive() -> None:
    # 1.0 would point behind the last token. The largest possible one is 1 - 2^-53.
    values = [uniform(seed, position) for seed in range(40) for position in range(250)]
    assert min(values) >= 0.0 and max(values) < 1.0
    assert ((1 << 64) - 1 >> 11) * 2.0**-53 < 1.0


@pytest.mark.parametrize("along", ["positions of a seed", "seeds at a position", "a diagonal"])
def test_numbers_look_uniform_and_neighbours_independent(along: str) -> None:
    """Pearson's chi-square of 64 bins, and of the 16 x 16 pairs of neighbours: below the 99.9 % point of each."""
    pair = {
        "positions of a seed": lambda i: (12345, i),
        "seeds at a position": lambda i: (i, 17),
        "a diagonal": lambda i: (i, i),  # the two must not cancel out
    }[along]
    values = [uniform(*pair(i)) for i in range(20000)]
    bins = [0] * 64
    for value in values:
        bins[int(value * 64)] += 1
    assert chi_square(bins) < 103.4  # 63 degrees of freedom
    pairs = [0] * 256
    for a, b in zip(values[::2], values[1::2], strict=True):
        pairs[int(a * 16) * 16 + int(b * 16)] += 1
    assert chi_square(pairs) < 330.5  # 255 degrees of freedom


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)
