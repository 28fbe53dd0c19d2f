"""Several attention groups in one scheduler: shares of rows, routing of requests, and groups without pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from random import Random

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.sched.batch import Batch
from narrows.sched.group_routing import choose_placement
from narrows.sched.scheduler import Limits, Request, Scheduler

ROOMY = 1000


def make(**limits: int) -> Scheduler:
    defaults = {"num_groups": 4, "rows_per_step": 64, "page_size": 4, "pages_per_group": ROOMY, "max_context": 4000}
    return Scheduler(Limits(**{**defaults, **limits}))


def add(
    scheduler: Scheduler,
    number: int,
    own: int,
    *,
    shared: int = 0,
    prefix: int = 0,
    max_tokens: int = 8,
    priority: int = 0,
    client: str = "",
) -> Request:
    """A prompt of ``shared`` tokens that all with that ``prefix`` begin with, and ``own`` that no other has."""
    tokens = tuple(range(prefix * 10_000, prefix * 10_000 + shared))
    tokens += tuple(range(10**6 + number * 10_000, 10**6 + number * 10_000 + own))
    request = Request(id=number, prompt=tokens, max_tokens=max_tokens, priority=priority)
    request.client = client or f"own {number}"
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    scheduler.commit((7,) * batch.num_logit_rows)
    scheduler.check_integrity()
    return batch


# -- rows --------------------------------------------------------------------------------------------------------------


def test_admission_continues_until_each_group_has_its_share_of_rows() -> None:
    """Not until as many rows as a step has are waiting in one group."""
    scheduler = make()
    for number, own in enumerate((500, 3, 90, 90, 90, 90)):
        add(scheduler, number, own)
    assert step(scheduler).group_rows == (16, 16, 16, 16)
    assert [len(group) for group in scheduler.running] == [1, 2, 1, 1] and len(scheduler.waiting) == 1
    assert [step(scheduler).group_rows for _ in range(4)] == [(16, 16, 16, 16)] * 4
    assert scheduler.stats().idle_rows == (0, 0, 0, 0)


def test_a_group_alone_with_prompts_has_all_rows() -> None:
    scheduler = make()
    add(scheduler, 0, 200)
    assert [step(scheduler).group_rows for _ in range(3)] == [(64, 0, 0, 0)] * 3


def test_an_urgent_prompt_never_waits_for_a_less_urgent_one_of_another_group() -> None:
    scheduler = make(num_groups=2, align_steps=0)
    add(scheduler, 0, 500)
    add(scheduler, 1, 500)
    assert step(scheduler).group_rows == (32, 32)
    urgent = add(scheduler, 2, 100, priority=-1)
    rows = {chunk.request: len(chunk.tokens) for group in step(scheduler).groups for chunk in group}
    assert rows == {2: 64}
    rows = {chunk.request: len(chunk.tokens) for group in step(scheduler).groups for chunk in group}
    assert rows == {2: 36, 0: 14, 1: 14} and urgent.prefilled


def test_a_clients_first_prompt_never_waits_for_further_prompts_of_another_group() -> None:
    scheduler = make(num_groups=2, align_steps=0)
    for number in range(4):
        add(scheduler, number, 300 - number, client="flood")
    step(scheduler)
    honest = add(scheduler, 9, 60)
    rows = {chunk.request: len(chunk.tokens) for group in step(scheduler).groups for chunk in group}
    assert honest.group == 1 and rows[9] == 32, "as many as the flood's first prompt"
    rows = {chunk.request: len(chunk.tokens) for group in step(scheduler).groups for chunk in group}
    assert rows == {0: 36, 9: 28}, "and the flood's second has none before both are done"


# -- routing ----------------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_group_with_the_least_left_to_compute() -> None:
    scheduler = make(num_groups=3, decode_weight=0, rows_per_step=6)
    sizes = (20, 4, 8, 4, 1)
    requests = [add(scheduler, number, own) for number, own in enumerate(sizes)]
    step(scheduler)
    assert [request.group for request in requests[:3]] == [0, 1, 2]
    for _ in range(3):
        step(scheduler)
    assert requests[3].group == 1, "group 1 has nothing left, group 2 something, group 0 most"


@pytest.mark.parametrize(("pending", "group"), [(59, 0), (60, 1), (61, 1)])
def test_a_cached_prefix_attracts_a_request_as_far_as_it_saves_rows(pending: int, group: int) -> None:
    """40 tokens are cached where ``pending`` rows are to be computed; elsewhere 20 are, of fewer tokens in all."""
    scheduler = make(num_groups=2, decode_weight=0, rows_per_step=1000, max_context=4000)
    add(scheduler, 0, 1, shared=40, max_tokens=1)
    step(scheduler)
    assert not scheduler.has_work
    limits, running = scheduler.limits, scheduler.running
    for number, rows in enumerate((pending, 20)):
        running[number].append(Request(id=50 + number, prompt=(3,) * rows, max_tokens=1, group=number))
    like = Request(id=1, prompt=(*range(40), 7, 7, 7), max_tokens=8)
    placement = choose_placement(like, scheduler.pools, running, limits)
    assert placement is not None and (placement.group, len(placement.found)) == (group, 10 if group == 0 else 0)


@pytest.mark.parametrize(("running", "group"), [(14, 0), (16, 1)])
def test_each_running_request_counts_as_256_rows_against_a_cached_prefix(running: int, group: int) -> None:
    """3,840 cached tokens are worth 15 of them."""
    scheduler = make(num_groups=2, rows_per_step=4000, page_size=16)
    add(scheduler, 0, 1, shared=3840, max_tokens=1)
    step(scheduler)
    for number in range(running):
        decoding = Request(id=50 + number, prompt=(3,), max_tokens=9, group=0, num_cached=1, num_sampled=1)
        scheduler.running[0].append(decoding)
    like = Request(id=1, prompt=(*range(3840), 7, 7, 7), max_tokens=8)
    placement = choose_placement(like, scheduler.pools, scheduler.running, scheduler.limits)
    assert placement is not None and placement.group == group


def test_running_requests_count_so_a_shared_prefix_idles_no_group() -> None:
    """Two prefixes, as reinforcement learning sends them: their savings must not keep half of the groups empty."""
    scheduler = make(rows_per_step=2048, page_size=16)
    for number in range(64):
        add(scheduler, number, 32, shared=3584, prefix=number % 2, max_tokens=256)
    for _ in range(60):
        step(scheduler)
    assert not scheduler.waiting
    running = [len(group) for group in scheduler.running]
    assert min(running) >= 8 and max(running) <= 24
    stats = scheduler.stats()
    assert stats.cached_prompt_tokens > 0.85 * stats.prompt_tokens, "each group has computed each prefix once at most"


def test_equal_loads_give_equal_steps() -> None:
    def steps() -> list[Batch]:
        rng, scheduler = Random(5), make(rows_per_step=96, pages_per_group=200, requests_per_group=6)
        for number in range(60):
            add(scheduler, number, rng.randint(1, 90), shared=rng.choice((0, 40)), prefix=rng.randint(0, 3))
        found = []
        while scheduler.has_work:
            found.append(step(scheduler))
        return found

    assert steps() == steps()


# -- a group without pages ---------------------------------------------------------------------------------------------


def test_a_group_short_of_pages_stalls_no_other_and_keeps_its_waiting_order() -> None:
    """Both groups have 50 pages. A request that needs 45 waits for one of them; small ones continue in the other."""
    scheduler = make(num_groups=2, pages_per_group=51, max_context=200, align_steps=0)
    held = [add(scheduler, number, 60, max_tokens=40) for number in range(2)]
    step(scheduler)
    step(scheduler)
    assert [request.group for request in held] == [0, 1]
    large = add(scheduler, 2, 180, max_tokens=4)
    small = [add(scheduler, 10 + number, 8, max_tokens=3) for number in range(60)]
    seen: dict[int, int] = {}
    steps = 0
    while large.group < 0:
        step(scheduler)
        steps += 1
        seen |= {request.id: request.group for request in small if request.group >= 0}
    assert large.holds == -1 and steps <= 40, "as long as the text takes that has the pages"
    assert len(seen) > 20 and set(seen.values()) == {1}, "others pass it in the group that it does not wait for"
    while scheduler.has_work:
        step(scheduler)
    stats = scheduler.stats()
    assert large.finish_reason == "length" and stats.preemptions == 0
    assert stats.bound_steps["kv_pages"] >= steps - 1 and stats.short_steps[0] >= steps - 1


def test_a_stream_of_small_requests_never_starves_a_large_one() -> None:
    scheduler = make(num_groups=3, pages_per_group=21, max_context=80, rows_per_step=32)
    number = 100
    for _ in range(12):
        add(scheduler, number := number + 1, 8, max_tokens=10)
    step(scheduler)
    large = [add(scheduler, number, 70, max_tokens=8) for number in range(3)]
    for _ in range(60):
        for _ in range(3):
            add(scheduler, number := number + 1, 8, max_tokens=10)
        step(scheduler)
    assert [request.finish_reason for request in large] == ["length"] * 3
    assert scheduler.stats().waiting > 50, "there were always others"


def test_with_one_group_no_request_passes_one_that_waits_for_pages() -> None:
    scheduler = make(num_groups=1, pages_per_group=21, max_context=80)
    add(scheduler, 0, 40, max_tokens=30)
    step(scheduler)
    large, small = add(scheduler, 1, 60, max_tokens=4), add(scheduler, 2, 4, max_tokens=4)
    for _ in range(20):
        step(scheduler)
    assert (large.group, small.group) == (-1, -1)


def test_only_the_group_out_of_pages_preempts_and_stats_name_it() -> None:
    """Five texts on the group that has their prefix need 260 pages of 190; one on the other group 105."""
    scheduler = make(num_groups=2, pages_per_group=191, rows_per_step=512, max_context=600, decode_weight=16)
    long = [add(scheduler, 0, 4, shared=400, max_tokens=120)]
    step(scheduler)
    long += [add(scheduler, number, 4, shared=400, max_tokens=120) for number in range(1, 5)]
    other = add(scheduler, 10, 300, max_tokens=120)
    rows = []
    while not other.finish_reason:
        rows.append(step(scheduler).group_rows)
        assert other.group == 1 or other.finish_reason
        assert not [each for each in long if each.group == 1], "there is no room for one"
    assert len(rows) == 120 and all(each[1] for each in rows), "the other group has its rows in every step"
    stats = scheduler.stats()
    assert stats.group_preemptions[0] > 0 and stats.group_preemptions[1] == 0
    assert stats.short_steps[0] > 0 and stats.preemptions == sum(stats.group_preemptions)
    assert 0 < stats.bound_steps["kv_pages"] < stats.steps
    while scheduler.has_work:
        step(scheduler)
    assert {request.finish_reason for request in long} == {"length"}


def test_a_preempted_text_continues_in_another_group_and_stats_name_its_own() -> None:
    """Group 1 is short of pages; its preempted texts find room in group 0 at once, so no request waits."""
    scheduler = make(num_groups=2, pages_per_group=31, max_context=200, decode_weight=0)
    add(scheduler, 0, 60, max_tokens=8)
    pair = [add(scheduler, 1, 4, shared=40, max_tokens=60)]
    step(scheduler)
    pair.append(add(scheduler, 2, 4, shared=40, max_tokens=60))
    step(scheduler)
    assert [request.group for request in pair] == [1, 1]
    while scheduler.has_work:
        step(scheduler)
        assert not scheduler.waiting
    stats = scheduler.stats()
    assert (stats.group_preemptions, stats.short_steps, stats.bound_steps["kv_pages"]) == ((0, 1), (0, 1), 1)


@pytest.mark.parametrize(
    ("limits", "bound"),
    [
        ({"requests_per_group": 1}, {"requests"}),
        ({"rows_per_step": 16}, {"rows"}),
        ({"pages_per_group": 14, "max_context": 48}, {"kv_pages"}),
        ({}, set()),
    ],
)
def test_the_limit_that_binds_is_named(limits: dict[str, int], bound: set[str]) -> None:
    scheduler = make(**{"num_groups": 2, "rows_per_step": 200, **limits})
    for number in range(6):
        add(scheduler, number, 20, max_tokens=20)
    while scheduler.has_work:
        step(scheduler)
    steps = scheduler.stats().bound_steps
    assert {name for name, count in steps.items() if count} == bound and max(steps.values()) < scheduler.stats().steps


# -- any load ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=examples(40), deadline=None)
def test_no_group_with_prompts_waits_while_another_has_more_than_its_share(seed: int) -> None:
    rng = Random(seed)
    scheduler = make(
        num_groups=rng.randint(2, 4),
        rows_per_step=rng.randint(4, 60),
        pages_per_group=rng.randint(12, 60),
        requests_per_group=rng.randint(1, 6),
        max_context=44,
        align_steps=0,
        prefix_cache=rng.random() < 0.5,
    )
    in_flight: deque[Batch] = deque()
    number = 0
    for turn in range(3000):
        if turn < 60 and rng.random() < 0.7:
            add(scheduler, number, rng.randint(1, 24), shared=rng.choice((0, 8)), max_tokens=rng.randint(1, 12))
            number += 1
        before = scheduler.stats()
        decode = {(each.id, each.num_cached) for group in scheduler.running for each in group if each.prefilled}
        batch = scheduler.schedule() if len(in_flight) < 2 else None
        scheduler.check_integrity()
        if batch is not None:
            in_flight.append(batch)
            look_at(scheduler, batch, decode, before.bound_steps)
        elif not in_flight:
            assert not scheduler.has_work, "it stands still"
            if turn >= 60:
                break
        if in_flight and (batch is None or rng.random() < 0.5):
            scheduler.commit((7,) * in_flight.popleft().num_logit_rows)
    assert not scheduler.has_work, "somebody starved"


def look_at(scheduler: Scheduler, batch: Batch, decode: set[tuple[int, int]], bound_before: Mapping[str, int]) -> None:
    limits, stats = scheduler.limits, scheduler.stats()
    bound = {name for name, count in stats.bound_steps.items() if count > bound_before[name]}
    assert batch.num_rows <= limits.rows_per_step
    prompts = [
        sum(len(chunk.tokens) for chunk in group if (chunk.request, chunk.start) not in decode)
        for group in batch.groups
    ]
    ran = {chunk.request: len(chunk.tokens) for group in batch.groups for chunk in group}
    for group in scheduler.running:
        for request in group:
            unfilled = request.wants_rows and not request.prefilled and request.rows_left
            if unfilled and (request.id in ran or request.num_cached < len(request.prompt)):
                assert batch.num_rows == limits.rows_per_step and "rows" in bound, "a prompt waits, and rows are left"
                assert max(prompts) <= prompts[request.group] + 1, "another group has more than its share"
    if scheduler.waiting:
        assert bound, "somebody waits, and nothing says why"
        first = scheduler.waiting[0]
        if batch.num_rows < limits.rows_per_step and not limits.prefix_cache:  # which this step may have filled
            assert choose_placement(first, scheduler.pools, scheduler.running, limits) is None, "the first could run"
