"""The simulated engine: it goes one step ahead as the real one, every request ends, and equal loads give equal runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.layout import Mesh
from narrows.sched.batch import Batch
from narrows.sched.limits import Limits
from narrows.sim.costs import StepCost
from narrows.sim.engine import Outcome, simulate
from narrows.sim.intake import Intake
from narrows.sim.search import Candidate, Target, meshes, ranked
from narrows.workload.arrivals import Ask, Prefixes, arrive, random_lengths


class Costs:
    """Seconds by a function of a batch's phase and rows."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self._seconds = seconds

    def cost(self, batch: Batch) -> StepCost:
        seconds = self._seconds(batch.phase, batch.num_rows)
        return StepCost(seconds=seconds, parts={("work", "assumed"): seconds})


SIMPLE = Costs(lambda phase, rows: 1.0 if phase == "prefill" else 0.5)


def ask(at_s: float, given_tokens: int, made: int) -> Ask:
    return Ask(at_s=at_s, input_tokens=given_tokens, output_tokens=made)


def test_a_single_request_runs_its_steps_in_sequence() -> None:
    found = simulate(Limits(), SIMPLE, [ask(2.0, 10, 4)])
    (answer,) = found.answers
    assert answer.sent_s == 2.0 and answer.pieces_s == (3.0, 3.5, 4.0, 4.5) and answer.ended_s == 4.5
    assert (answer.input_tokens, answer.output_tokens) == (10, 4)
    assert found.busy_s == 2.5 and found.stats.steps == 4


def test_a_request_that_arrives_behind_two_steps_waits_for_both() -> None:
    # At 0 the first request's prefill and its decode step are handed out: until 1.0 and 1.5. The second comes at 0.1,
    # so its prefill is in the step that is handed out at 1.0, and begins at 1.5.
    found = simulate(Limits(), SIMPLE, [ask(0.0, 10, 4), ask(0.1, 10, 2)])
    first, second = found.answers
    assert first.pieces_s == (1.0, 1.5, 2.5, 3.0)
    assert second.pieces_s == (2.5, 3.0)
    assert second.ttft_s == pytest.approx(2.4)


def test_a_request_reaches_the_scheduler_after_its_arrival_delay() -> None:
    # Its way counts in its time to the first token, and it has its place meanwhile.
    asks = [ask(2.0, 10, 4), ask(2.0, 10, 2)]
    found = simulate(Limits(), SIMPLE, asks, concurrency=1, intake=Intake(arrival_s=0.25))
    first, second = found.answers
    assert first.sent_s == 2.0 and first.pieces_s == (3.25, 3.75, 4.25, 4.75)
    assert second.sent_s == 4.75 and second.pieces_s == (6.0, 6.5)
    refused = simulate(Limits(max_context=16), SIMPLE, [ask(0.0, 16, 1)], intake=Intake(arrival_s=0.25))
    assert refused.answers[0].error and refused.answers[0].ended_s == 0.25


def prompts_of(intake: Intake) -> list[tuple[float, int]]:
    """When steps with prompts end, and their rows, beside a text that decodes: three prompts of 4 rows come apart."""
    steps: list[tuple[str, int]] = []
    watch = lambda batch, _: steps.append((batch.phase, batch.num_rows))  # noqa: E731
    asks = [ask(0.0, 1, 100), *(ask(at, 4, 1) for at in (5.1, 6.1, 7.1))]
    simulate(Limits(), SIMPLE, asks, intake=intake, watch=watch)
    ends = itertools.accumulate(1.0 if phase == "prefill" else 0.5 for phase, _ in steps)
    return [(end, rows) for end, (phase, rows) in zip(ends, steps, strict=True) if phase == "prefill"][1:]


def test_requests_are_looked_for_once_in_so_many_decode_steps_and_after_prompts() -> None:
    # The text's first step ends at 1, decode steps at 1.5, 2, ... One step ahead, what comes at 5.1 is in the step that
    # begins at 6.
    assert prompts_of(Intake()) == [(7.0, 5), (8.5, 5), (9.5, 5)]
    # The 12th decode step begins at 6.5. The last prompt comes just after the look that follows the others' step.
    assert prompts_of(Intake(recv_interval=12)) == [(8.0, 9), (8.0 + 12 * 0.5 + 1.0, 5)]
    assert prompts_of(Intake(recv_interval=1000)) == [(51.5, 12)]  # the text's 99 decode steps are over


def test_prompts_wait_for_others_but_not_for_ever() -> None:
    assert prompts_of(Intake(wait_steps=100, wait_rows=13)) == [(9.0, 13)]  # the text's row and all three
    assert prompts_of(Intake(wait_steps=100, wait_rows=9))[0][1] == 9
    assert [rows for _, rows in prompts_of(Intake(wait_steps=1, wait_rows=1000))] == [5, 9]
    late = prompts_of(Intake(wait_steps=30, wait_rows=1000))
    assert [rows for _, rows in late] == [13] and late[0][0] > 5.1 + 30 * 0.5


def test_nothing_waits_where_nothing_decodes() -> None:
    intake = Intake(recv_interval=1000, wait_steps=1000, wait_rows=1000)
    found = simulate(Limits(), SIMPLE, [ask(0.0, 4, 2), ask(10.0, 4, 2)], intake=intake)
    assert [answer.ttft_s for answer in found.answers] == [1.0, 1.0]


@settings(max_examples=examples(20), deadline=None)
@given(interval=st.integers(1, 50), steps=st.integers(0, 50), rows=st.integers(0, 64), seed=st.integers(0, 99))
def test_every_request_ends_however_they_are_taken_in(interval: int, steps: int, rows: int, seed: int) -> None:
    asks = arrive(random_lengths(12, 8, 8, spread=0.5, seed=seed, prefixes=Prefixes()), rate=1.0, seed=seed)
    found = simulate(Limits(), SIMPLE, asks, intake=Intake(recv_interval=interval, wait_steps=steps, wait_rows=rows))
    assert [answer.output_tokens for answer in found.answers] == [ask.output_tokens for ask in asks]


def test_concurrency_is_bounded_and_places_are_refilled_after_the_next_step() -> None:
    found = simulate(Limits(), SIMPLE, [ask(0.0, 4, 2)] * 3, concurrency=1)
    assert found.figures.peak_concurrency == 1
    # 0: prefill, decode; at 1.5 it ends and the next is sent, whose steps are the only ones then.
    assert [answer.sent_s for answer in found.answers] == [0.0, 1.5, 3.0]
    busy = simulate(Limits(), SIMPLE, [ask(0.0, 4, 2), ask(0.0, 4, 9), ask(0.0, 4, 2)], concurrency=2)
    # The short one ends at 1.5, when the ranks have the long one's third step (until 2.0) and its fourth is handed out.
    assert busy.answers[2].sent_s == 1.5 and busy.answers[2].pieces_s[0] == 3.5


def test_a_request_that_can_never_run_ends_with_an_error() -> None:
    found = simulate(Limits(max_context=16), SIMPLE, [ask(0.0, 16, 1), ask(1.0, 8, 1)])
    assert found.figures.failed == 1 and found.figures.completed == 1
    assert "the context holds 16" in found.answers[0].error


def test_prefixes_are_found_and_pages_run_out() -> None:
    asks = random_lengths(12, 20, 120, prefixes=Prefixes(count=2, tokens=64))
    roomy = simulate(Limits(), SIMPLE, asks, concurrency=2)
    assert roomy.figures.cached_tokens == 10 * 64 and roomy.stats.preemptions == 0
    tight = simulate(Limits(pages_per_group=33), SIMPLE, asks)
    assert tight.stats.preemptions > 0 and tight.kv_pages_most <= 32
    none = simulate(Limits(prefix_cache=False), SIMPLE, asks, concurrency=2)
    assert none.figures.cached_tokens == 0
    for found in (roomy, tight, none):
        assert found.figures.completed == 12 and found.figures.output_tokens == 12 * 120


@settings(max_examples=examples(60), deadline=None)
@given(
    num=st.integers(1, 25),
    given_tokens=st.integers(1, 60),
    made=st.integers(1, 20),
    spread=st.floats(0, 0.9),
    prefix=st.integers(0, 40),
    rate=st.floats(0.2, 50),
    concurrency=st.integers(0, 5),
    num_groups=st.integers(1, 3),
    rows=st.integers(1, 64),
    pages=st.integers(10, 60),
    seed=st.integers(0, 9),
)
def test_every_request_ends_and_is_counted(
    num: int,
    given_tokens: int,
    made: int,
    spread: float,
    prefix: int,
    rate: float,
    concurrency: int,
    num_groups: int,
    rows: int,
    pages: int,
    seed: int,
) -> None:
    asks = random_lengths(num, given_tokens, made, spread=spread, seed=seed, prefixes=Prefixes(count=2, tokens=prefix))
    asks = arrive(asks, rate, seed=seed)
    limits = Limits(
        num_groups=num_groups, rows_per_step=rows, requests_per_group=4, pages_per_group=pages, max_context=256
    )
    costs = Costs(lambda phase, rows: 0.01 + 0.001 * rows + (0.1 if phase == "prefill" else 0.0))
    steps: list[tuple[str, int]] = []
    spent: list[float] = []

    def watch(batch: Batch, cost: StepCost) -> None:
        steps.append((batch.phase, batch.num_rows))
        spent.append(cost.seconds)

    found = simulate(limits, costs, asks, concurrency=concurrency, watch=watch)
    assert len(found.answers) == num
    for wanted, answer in zip(asks, found.answers, strict=True):
        if answer.error:
            assert wanted.input_tokens + min(wanted.output_tokens, 256 - wanted.input_tokens) > limits.tokens_per_group
            continue
        assert answer.sent_s >= wanted.at_s and answer.input_tokens == wanted.input_tokens
        assert answer.output_tokens == len(answer.pieces_s) == wanted.output_tokens
        times = [answer.sent_s, *answer.pieces_s]
        assert all(a < b for a, b in itertools.pairwise(times)) and answer.ended_s == times[-1]
    assert not concurrency or found.figures.peak_concurrency <= concurrency
    stats = found.stats
    assert stats.kv_pages_used == stats.running == stats.waiting == 0
    assert stats.steps == len(steps) and max((n for _, n in steps), default=0) <= rows
    assert found.busy_s == pytest.approx(sum(spent)) == pytest.approx(found.seconds.get("work", 0.0))
    assert sum(n for _, n in steps) >= stats.prompt_tokens - stats.cached_prompt_tokens
    last = max((answer.ended_s for answer in found.answers if not answer.error), default=0.0)
    assert found.busy_s <= last + 2 * max(spent, default=0.0)
    again = simulate(limits, costs, asks, concurrency=concurrency)
    assert again == found


# -- targets -----------------------------------------------------------------------------------------------------------


def outcome(decode_s: float, num: int = 8) -> Outcome:
    return simulate(Limits(), Costs(lambda phase, rows: 1.0 if phase == "prefill" else decode_s), [ask(0, 4, 5)] * num)


def candidate(found: Outcome | None, layout: str = "auto", refusal: str = "") -> Candidate:
    return Candidate(mesh=Mesh.of(dp=1, tp=1), layout=layout, dtype="bf16", outcome=found, refusal=refusal)


def test_the_best_deployment_is_first_and_others_have_reasons() -> None:
    slow, fast = outcome(0.5), outcome(0.1)
    target = Target(ttft_s=2.0, tpot_s=0.3)
    order = ranked(
        [candidate(None, "a", "does not fit"), candidate(slow, "b"), candidate(fast, "c")],
        target,
    )
    assert [found.layout for found in order] == ["c", "b", "a"]
    assert target.misses(fast) == () and target.goodput(fast) == pytest.approx(8 / 1.4)
    (missed,) = target.misses(slow)
    assert missed == "misses TPOT by 66.7 %"
    assert target.goodput(slow) == 0
    assert Target(ttft_s=0.5).misses(fast) == ("misses TTFT by 100.0 %",)
    assert Target().goodput(slow) == slow.figures.request_throughput and not Target().is_set


def test_results_are_ranked_by_target_goodput_throughput_and_time() -> None:
    few, costs = Limits(rows_per_step=16), Costs(lambda phase, rows: 1.0 if phase == "prefill" else 0.1)
    crowd = simulate(few, costs, [ask(0, 4, 5)] * 12)  # four prompts in each step: some wait
    alone = outcome(0.5, num=1)
    target = Target(ttft_s=1.0)
    assert target.misses(crowd) and not target.misses(alone)
    assert target.goodput(crowd) > target.goodput(alone)
    assert [found.layout for found in ranked([candidate(crowd, "a"), candidate(alone, "b")], target)] == ["b", "a"]
    quick, many = outcome(0.1, num=1), outcome(0.2, num=8)
    assert quick.figures.e2e_ms.mean < many.figures.e2e_ms.mean
    assert [found.layout for found in ranked([candidate(quick, "a"), candidate(many, "b")], Target())] == ["b", "a"]


def test_meshes_are_all_that_the_model_can_be_split_over() -> None:
    assert [str(mesh) for mesh in meshes(preset("deepseek-v3"), 4)] == ["dp 1 x tp 4", "dp 2 x tp 2", "dp 4 x tp 1"]
    assert [mesh.sizes for mesh in meshes(preset("dsv3-mini"), 32)] == [(2, 16), (4, 8), (8, 4), (16, 2), (32, 1)]
