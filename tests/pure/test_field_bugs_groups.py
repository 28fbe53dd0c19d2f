"""Field bugs of attention groups: loads on the real scheduler in assumed time, with the field's rules as mistakes.

Each test is one line of docs/field-bugs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import pytest

from narrows.sched import queue, scheduler
from narrows.sched.batch import Batch
from narrows.sched.chunks import next_rows
from narrows.sched.group_routing import Placement, choose_placement
from narrows.sched.limits import Limits
from narrows.sched.pages import PagePool
from narrows.sched.queue import WaitingQueue
from narrows.sched.request import Request
from narrows.sim.costs import StepCost
from narrows.sim.engine import Outcome, simulate
from narrows.workload.arrivals import Ask, Prefixes, arrive, random_lengths

Put = Callable[[pytest.MonkeyPatch], None]
GROUPS = 4


class ByLargestGroup:
    """Seconds of a step: the time of its largest group, and of all rows together."""

    def __init__(self) -> None:
        self.group_rows: list[tuple[int, ...]] = []

    def cost(self, batch: Batch) -> StepCost:
        self.group_rows.append(batch.group_rows)
        seconds = 0.01 + 2e-4 * max(batch.group_rows) + 2e-5 * batch.num_rows
        return StepCost(seconds=seconds, parts={("work", "assumed"): seconds})


def run(asks: Sequence[Ask], *, concurrency: int = 0, **limits: Any) -> tuple[Outcome, list[tuple[int, ...]]]:
    costs = ByLargestGroup()
    given = {"num_groups": GROUPS, "rows_per_step": 256, "pages_per_group": 4000, "max_context": 4000, **limits}
    outcome = simulate(Limits(**given), costs, asks, concurrency=concurrency)
    assert outcome.figures.failed == 0 and outcome.figures.completed == len(asks)
    return outcome, costs.group_rows


def idle_share(group_rows: Sequence[tuple[int, ...]]) -> float:
    """Of the row slots of all steps: each step has as many for every group as its largest one has rows."""
    slots = sum(max(rows) * len(rows) for rows in group_rows)
    return 1 - sum(map(sum, group_rows)) / slots


def seen(put: Put | None, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]) -> None:
    """The check holds; with a mistake put in it does not."""
    if put is None:
        check()
        return
    put(monkeypatch)
    with pytest.raises(AssertionError, match="seen"):
        check()


# -- the field's rules -------------------------------------------------------------------------------------------------


def _choose(monkeypatch: pytest.MonkeyPatch, key: Callable[[Placement, Sequence[Request]], tuple[int, ...]]) -> None:
    def choose(
        request: Request,
        pools: Sequence[PagePool],
        running: Sequence[Sequence[Request]],
        limits: Limits,
        closed: Container[int] = (),
    ) -> Placement | None:
        placements = [
            placement
            for group in range(limits.num_groups)
            if (placement := choose_placement(request, pools, running, limits, {*range(limits.num_groups)} - {group}))
            and group not in closed
        ]
        return min(
            placements, key=lambda placement: (*key(placement, running[placement.group]), placement.group), default=None
        )

    monkeypatch.setattr(queue, "choose_placement", choose)


def to_the_fewest_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    _choose(monkeypatch, lambda placement, running: (len(running),))


def to_the_longest_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    _choose(monkeypatch, lambda placement, running: (-len(placement.found), len(running)))


def to_the_fewest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached prefix counts as if it had to be computed."""
    _choose(monkeypatch, lambda placement, running: (sum(other.num_tokens for other in running),))


def rows_by_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def deal(waves: Iterable[Sequence[Request]], budget: int, limits: Limits) -> dict[Request, int]:
        dealt = {}
        for request in (each for wave in waves for each in wave):
            if rows := next_rows(request, budget, limits):
                dealt[request] = rows
                budget -= rows
        return dealt

    def left(ahead: Sequence[int], groups: Iterable[int], budget: int) -> bool:
        return sum(ahead) < budget

    monkeypatch.setattr(scheduler, "share_rows", deal)
    monkeypatch.setattr(queue, "has_row_left", left)


def everybody_waits_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def admit(self: WaitingQueue, budget: int) -> None:
        table = self._table
        while (found := self._next(budget, range(table.limits.num_groups), ())) is not None:
            placement = choose_placement(found[0], table.pools, table.running, table.limits)
            if placement is None:
                return
            table.place(found[0], placement)

    monkeypatch.setattr(WaitingQueue, "admit", admit)


# -- the threads -------------------------------------------------------------------------------------------------------


def planted(*mistakes: Put) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("put", [None, *mistakes], ids=lambda put: put.__name__ if put else "as-it-is")


@planted(to_the_fewest_requests, to_the_fewest_tokens)
def test_requests_go_to_the_group_with_their_prefix(put: Put | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang #26611, #31170, tpu-inference #3307, vllm #52463: data-parallel routing loses the prefix."""

    def check() -> None:
        asks = random_lengths(160, 24, 24, prefixes=Prefixes(count=12, tokens=768), seed=3)
        stats = run(asks, concurrency=16)[0].stats
        assert stats.cached_prompt_tokens > 0.75 * stats.prompt_tokens, "seen"

    seen(put, monkeypatch, check)


@planted(to_the_longest_prefix)
def test_one_prefix_does_not_pin_requests_to_one_group(put: Put | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang #31170, vllm #52463: routing by prefix alone sends every request of one prefix to one rank."""

    def check() -> None:
        asks = arrive(random_lengths(120, 24, 48, prefixes=Prefixes(count=1, tokens=768)), rate=30.0)
        _, group_rows = run(asks, concurrency=48)
        rows = [sum(rows[group] for rows in group_rows) for group in range(GROUPS)]
        assert min(rows) > 0.5 * sum(rows) / GROUPS, "seen"

    seen(put, monkeypatch, check)


@planted(rows_by_turn_alone)
def test_no_groups_idle_while_prompts_queue_on_one(put: Put | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """miles #2012, vllm #36748, #40795, sglang #21699, #35964: three of four ranks idle, the queue is on one."""

    def check() -> None:
        asks = arrive(random_lengths(60, 1000, 16, spread=0.9, prefixes=Prefixes()), rate=20.0, burstiness=0.2)
        _, group_rows = run(asks)
        assert idle_share(group_rows) < 0.3, "seen"

    seen(put, monkeypatch, check)


@planted(rows_by_turn_alone)
def test_prompts_are_collected_over_groups(put: Put | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm/ATOM #1611, tpu-inference #2577: small prefills on some ranks delay the decode steps of all."""

    def check() -> None:
        asks = arrive(random_lengths(80, 300, 40, prefixes=Prefixes()), rate=15.0, burstiness=0.2, seed=1)
        outcome, group_rows = run(asks)
        prefill = [sorted(rows) for rows in group_rows if sum(rows) > 128]
        alone = sum(rows[-1] > 4 * rows[-2] + 64 for rows in prefill)
        assert alone < 0.2 * len(prefill), f"seen: {alone} of {len(prefill)} large steps were one group's"
        assert outcome.figures.tpot_ms.mean < 28, "seen"

    seen(put, monkeypatch, check)


@planted(everybody_waits_behind_the_first)
def test_a_group_out_of_pages_stalls_no_other(put: Put | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRT-LLM #17379, #17978, #14126, #8372: one attention-DP rank without KV pages stalls all silently.

    Long texts fill group 0, and one that fits nowhere now waits at the head of the queue.
    """

    def check() -> None:
        long = [Ask(at_s=0.0, input_tokens=900, output_tokens=300)] * 2
        large = [Ask(at_s=0.5, input_tokens=1200, output_tokens=8)]
        short = [Ask(at_s=0.6 + 0.02 * number, input_tokens=40, output_tokens=10) for number in range(60)]
        outcome, _ = run([*long, *large, *short], num_groups=2, pages_per_group=101, max_context=1600)
        stats = outcome.stats
        assert stats.bound_steps["kv_pages"] > 0 and max(stats.short_steps) > 0, "seen: nothing says who is short"
        waits = [answer.ttft_s for answer in outcome.answers if answer.input_tokens == 40]
        assert len(waits) == 60 and max(waits) < 1.0, "seen"

    seen(put, monkeypatch, check)
