"""The scheduler's rules one by one: budget, admission, groups, running ahead, ends, and refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from narrows.errors import ConfigError
from narrows.sched.batch import Batch, sample_ref
from narrows.sched.guide import Guide
from narrows.sched.sampling import SamplingParams
from narrows.sched.scheduler import Limits, Request, Scheduler

EOS = frozenset({0})


def make(**limits: int) -> Scheduler:
    defaults = {"rows_per_step": 8, "page_size": 4, "pages_per_group": 17, "max_context": 64}
    return Scheduler(Limits(**{**defaults, **limits}))


def add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int, eos: frozenset[int] = EOS) -> Request:
    request = Request(id=number, prompt=tuple(range(1, prompt + 1)), max_tokens=max_tokens, eos_ids=eos)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    return batch


def commit(scheduler: Scheduler, ids: Sequence[int]) -> list[Request]:
    touched = scheduler.commit(tuple(ids))
    scheduler.check_integrity()
    return touched


def rows(batch: Batch) -> list[list[tuple[int, int, tuple[int, ...], int]]]:
    return [[(c.request, c.start, c.tokens, c.num_logits) for c in group] for group in batch.groups]


# -- the row budget --------------------------------------------------------------------------------------------------


def test_a_long_prompt_runs_in_chunks_and_only_the_last_has_logits() -> None:
    scheduler = make(rows_per_step=4)
    add(scheduler, 0, prompt=10, max_tokens=3)
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4), 0)]]
    assert rows(step(scheduler)) == [[(0, 4, (5, 6, 7, 8), 0)]]
    assert commit(scheduler, ()) == []
    assert rows(step(scheduler)) == [[(0, 8, (9, 10), 1)]]


def test_decode_rows_come_first_and_prompts_share_the_rest_in_order() -> None:
    scheduler = make(rows_per_step=6)
    add(scheduler, 0, prompt=2, max_tokens=5)
    step(scheduler)
    add(scheduler, 1, prompt=4, max_tokens=2)
    add(scheduler, 2, prompt=4, max_tokens=2)
    batch = step(scheduler)
    assert rows(batch) == [[(0, 2, (sample_ref(0),), 1), (1, 0, (1, 2, 3, 4), 1), (2, 0, (1,), 0)]]
    assert batch.num_rows == 6


def test_requests_beyond_the_budget_wait_and_all_finish() -> None:
    scheduler = make(rows_per_step=1, num_groups=2)
    requests = [add(scheduler, i, prompt=2, max_tokens=3, eos=frozenset()) for i in range(5)]
    for _ in range(100):
        batch = scheduler.schedule()
        if batch is None:
            break
        assert batch.num_rows == 1
        commit(scheduler, [7] * batch.num_logit_rows)
    assert [(r.output, r.finish_reason) for r in requests] == [([7, 7, 7], "length")] * 5


# -- prompts cut at fixed positions ----------------------------------------------------------------------------------


def test_prompts_are_cut_at_multiples_of_the_chunk() -> None:
    scheduler = make(rows_per_step=10, prefill_chunk=4)
    add(scheduler, 0, prompt=11, max_tokens=3)
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4), 0), (0, 4, (5, 6, 7, 8), 0)]]
    assert rows(step(scheduler)) == [[(0, 8, (9, 10, 11), 1)]]


def test_a_chunk_that_does_not_fit_waits_and_is_not_passed() -> None:
    scheduler = make(rows_per_step=4, prefill_chunk=4)
    add(scheduler, 0, prompt=2, max_tokens=3)
    long = add(scheduler, 1, prompt=5, max_tokens=1)
    add(scheduler, 2, prompt=1, max_tokens=1)  # would fit
    assert rows(step(scheduler)) == [[(0, 0, (1, 2), 1)]]
    assert rows(step(scheduler)) == [[(0, 2, (sample_ref(0),), 1)]]
    commit(scheduler, (7,))
    assert rows(step(scheduler)) == [[(0, 3, (sample_ref(0),), 1)]]
    commit(scheduler, (7,))
    assert rows(step(scheduler)) == [[(1, 0, (1, 2, 3, 4), 0)]]
    assert commit(scheduler, (7,))[0].finish_reason == "length"
    assert rows(step(scheduler)) == [[(1, 4, (5,), 1), (2, 0, (1,), 1)]]
    assert long.prefilled


def test_a_step_must_hold_a_chunk() -> None:
    assert make(rows_per_step=8, prefill_chunk=8).limits.prefill_chunk == 8
    with pytest.raises(ConfigError, match=r"chunks of 9 rows, but a step may hold 8; raise --max-rows to at least 9"):
        make(rows_per_step=8, prefill_chunk=9)


# -- admission and groups --------------------------------------------------------------------------------------------


def test_admission_reserves_a_page_per_growing_request_in_order() -> None:
    scheduler = make(pages_per_group=5)  # four pages of 4 tokens
    first = add(scheduler, 0, prompt=5, max_tokens=8, eos=frozenset())  # two pages now, three in the end
    second = add(scheduler, 1, prompt=5, max_tokens=2)  # two pages, but then the first has none to grow into
    third = add(scheduler, 2, prompt=1, max_tokens=1)  # one page would do, but it came later
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4, 5), 1)]]
    assert (len(first.pages), second.group, third.group) == (2, -1, -1)
    scheduler.abort(first)
    assert [chunk.request for chunk in step(scheduler).groups[0]] == [1, 2]


def test_pages_are_allocated_as_the_text_grows_and_a_chunk_lists_only_its_own() -> None:
    scheduler = make(rows_per_step=6, page_size=4)
    request = add(scheduler, 0, prompt=7, max_tokens=8)
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [2]
    assert len(request.pages) == 2
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [2]
    commit(scheduler, ())
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [2]
    commit(scheduler, (9,))
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [3]


def test_no_more_requests_per_group_than_the_limit() -> None:
    scheduler = make(num_groups=2, requests_per_group=1)
    for number in range(3):
        add(scheduler, number, prompt=2, max_tokens=2)
    assert [len(group) for group in step(scheduler).groups] == [1, 1]
    assert [request.id for request in scheduler.waiting] == [2]


# -- the prefix cache, preemption, priorities, alignment, guides -------------------------------------------------------


def test_a_cached_prompt_runs_its_last_token_and_a_scored_one_runs_all() -> None:
    scheduler = make(page_size=4)
    add(scheduler, 0, prompt=8, max_tokens=1)
    step(scheduler)
    commit(scheduler, (7,))
    again = add(scheduler, 1, prompt=8, max_tokens=1)
    assert rows(step(scheduler)) == [[(1, 4, (5, 6, 7, 8), 1)]]
    commit(scheduler, (7,))
    assert again.num_cached_prompt == 4 and scheduler.stats().cached_prompt_tokens == 4
    scored = Request(id=2, prompt=tuple(range(1, 9)), max_tokens=0, sampling=SamplingParams(prompt_logprobs=0))
    scheduler.add(scored)
    assert step(scheduler).groups[0][0].start == 0


def test_pages_are_found_by_requests_of_the_same_salt_alone() -> None:
    scheduler = make(page_size=4)
    for number, (salt, found) in enumerate(((b"", 0), (b"a", 0), (b"", 4), (b"a", 4), (b"b", 0))):
        request = Request(id=number, prompt=tuple(range(8)), max_tokens=1, cache_salt=salt)
        scheduler.add(request)
        step(scheduler)
        commit(scheduler, (7,))
        assert request.num_cached_prompt == found


def test_no_page_is_found_with_the_prefix_cache_off() -> None:
    scheduler = make(prefix_cache=False)
    for number in range(2):
        add(scheduler, number, prompt=8, max_tokens=1)
        assert rows(step(scheduler)) == [[(number, 0, tuple(range(1, 9)), 1)]]
        commit(scheduler, (7,))


def test_the_last_request_is_preempted_without_pages_and_recomputed() -> None:
    scheduler = make(pages_per_group=5, page_size=2, prefix_cache=False)  # four pages
    first, second = (add(scheduler, number, prompt=2, max_tokens=7, eos=frozenset()) for number in range(2))
    ran = []
    while scheduler.has_work:
        batch = step(scheduler)
        ran += [chunk for chunk in batch.groups[0] if chunk.request == 1]
        commit(scheduler, range(50, 50 + batch.num_logit_rows))
    assert scheduler.stats().preemptions == 1
    assert len(first.output) == len(second.output) == 7
    restart = next(chunk for chunk in ran[1:] if chunk.start == 0)
    assert restart.tokens == (1, 2, *second.output[: len(restart.tokens) - 2]) and len(restart.tokens) > 3
    assert (restart.num_prompt, restart.num_logits) == (2, 1)


def test_lower_priorities_run_first_without_starvation() -> None:
    scheduler = make(requests_per_group=1, aging_steps=5)
    add(scheduler, 0, prompt=1, max_tokens=1)
    late = add(scheduler, 1, prompt=1, max_tokens=1)
    patient = Request(id=2, prompt=(1,), max_tokens=1, priority=1)
    scheduler.add(patient)
    order = []
    for number in range(3, 20):
        order += [chunk.request for chunk in step(scheduler).groups[0]]
        commit(scheduler, (7,))
        add(scheduler, number, prompt=1, max_tokens=1)  # one more urgent request arrives per step
    assert late.finish_reason and order[1] == 1 and 3 in order[: order.index(2)]
    assert order.index(2) <= 7, "it goes before those that came 5 steps after it"


def test_a_priority_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="the priority is 101; it must be between -100 and 100"):
        make().add(Request(id=0, prompt=(1,), max_tokens=1, priority=101))


def test_a_prompt_waits_for_another_groups_only_briefly_and_while_decoding() -> None:
    scheduler = make(num_groups=2, align_steps=2)
    add(scheduler, 0, prompt=3, max_tokens=20, eos=frozenset())
    assert step(scheduler).group_rows == (3, 0), "nothing else runs"
    commit(scheduler, (7,))
    add(scheduler, 1, prompt=3, max_tokens=20, eos=frozenset())
    seen = []
    for _ in range(3):
        seen.append(step(scheduler).group_rows)
        commit(scheduler, (7,) * 2)
    assert seen == [(1, 0), (1, 0), (1, 3)]
    assert scheduler.stats().idle_rows == (2, 3 + 1 + 1)


def test_a_prompt_that_is_under_way_is_not_held_up_again() -> None:
    scheduler = make(num_groups=2, align_steps=1)
    add(scheduler, 0, prompt=3, max_tokens=20, eos=frozenset())
    step(scheduler)
    commit(scheduler, (7,))
    add(scheduler, 1, prompt=20, max_tokens=20, eos=frozenset())
    seen = []
    for _ in range(4):
        seen.append(step(scheduler).group_rows)
        commit(scheduler, (7,) * 2)
    assert seen == [(1, 0), (1, 7), (1, 7), (1, 6)]


class Countdown(Guide):
    """Allows token 8 until it came ``left`` times, then nothing."""

    def __init__(self, left: int) -> None:
        self.left = left

    def allowed(self) -> bytes:
        return b"\x00\x01" if self.left else b"\x00\x00"

    def advance(self, token: int) -> None:
        assert token == 8
        self.left -= 1


def test_a_guided_request_waits_for_its_token_and_ends_when_none_is_allowed() -> None:
    scheduler = make()
    request = Request(id=0, prompt=(1, 2), max_tokens=9, guide=Countdown(2))
    scheduler.add(request)
    assert step(scheduler).groups[0][0].allowed == b"\x00\x01"
    assert scheduler.schedule() is None
    commit(scheduler, (8,))
    assert step(scheduler).groups[0][0].tokens == (8,)
    commit(scheduler, (8,))
    assert (request.output, request.finish_reason) == ([8, 8], "stop")
    with pytest.raises(ConfigError, match="allows no first token"):
        scheduler.add(Request(id=1, prompt=(1,), max_tokens=1, guide=Countdown(0)))


def test_end_ids_are_banned_until_min_tokens() -> None:
    scheduler = make()
    params = SamplingParams(min_tokens=2)
    scheduler.add(Request(id=0, prompt=(1, 2), max_tokens=9, eos_ids=frozenset({5, 0}), sampling=params))
    banned = []
    for _ in range(3):
        banned.append(step(scheduler).groups[0][0].banned)
        commit(scheduler, (7,))
    assert banned == [(0, 5), (0, 5), ()]


def test_a_penalised_request_sends_its_cached_tokens_too() -> None:
    scheduler = make(page_size=4)
    add(scheduler, 0, prompt=8, max_tokens=1)
    step(scheduler)
    commit(scheduler, (7,))
    params = SamplingParams(repetition_penalty=1.5)
    scheduler.add(Request(id=1, prompt=tuple(range(1, 9)), max_tokens=4, sampling=params))
    assert step(scheduler).groups[0][0].skipped == (1, 2, 3, 4)
    assert step(scheduler).groups[0][0].skipped == ()


def test_a_group_without_requests_has_no_rows() -> None:
    scheduler = make(num_groups=4)
    add(scheduler, 0, prompt=3, max_tokens=2)
    assert step(scheduler).group_rows == (3, 0, 0, 0)


# -- one step ahead --------------------------------------------------------------------------------------------------


def test_a_token_is_a_reference_until_its_sample_is_committed_and_an_id_after() -> None:
    scheduler = make()
    add(scheduler, 0, prompt=2, max_tokens=5)
    step(scheduler)
    assert rows(step(scheduler)) == [[(0, 2, (sample_ref(0),), 1)]]
    commit(scheduler, (11,))
    assert rows(step(scheduler)) == [[(0, 3, (sample_ref(0),), 1)]]
    commit(scheduler, (12,))
    commit(scheduler, (13,))
    assert rows(step(scheduler)) == [[(0, 4, (13,), 1)]]


def test_a_reference_counts_among_the_samples_of_the_step_before() -> None:
    scheduler = make(rows_per_step=5)
    add(scheduler, 0, prompt=1, max_tokens=5)
    add(scheduler, 1, prompt=6, max_tokens=5)
    assert step(scheduler).samples() == ((0, 0),)
    assert step(scheduler).samples() == ((0, 0), (1, 1))
    commit(scheduler, (9,))
    assert rows(step(scheduler)) == [[(0, 2, (sample_ref(0),), 1), (1, 6, (sample_ref(1),), 1)]]


def test_a_third_step_without_a_commit_is_our_own_error() -> None:
    scheduler = make()
    add(scheduler, 0, prompt=2, max_tokens=5)
    step(scheduler)
    step(scheduler)
    with pytest.raises(AssertionError, match="commit a step first"):
        scheduler.schedule()


def test_no_row_is_scheduled_past_max_tokens() -> None:
    scheduler = make()
    request = add(scheduler, 0, prompt=2, max_tokens=2)
    step(scheduler)
    step(scheduler)
    commit(scheduler, (5,))
    assert scheduler.schedule() is None and scheduler.has_work
    assert commit(scheduler, (6,)) == [request]
    assert (request.output, request.finish_reason, scheduler.has_work) == ([5, 6], "length", False)


def test_a_late_end_drops_the_extra_sample_and_frees_pages() -> None:
    scheduler = make()
    request = add(scheduler, 0, prompt=2, max_tokens=9)
    other = add(scheduler, 1, prompt=2, max_tokens=9)
    step(scheduler)
    step(scheduler)
    assert commit(scheduler, (0, 7)) == [request, other]  # eos
    assert (request.finish_reason, request.pages) == ("stop", [])
    assert scheduler.pools[0].num_free == 16 - len(other.pages)
    assert rows(step(scheduler)) == [[(1, 3, (sample_ref(1),), 1)]]  # slot 1 of a step that still had both
    assert commit(scheduler, (5, 8)) == [other]
    assert (request.output, other.output) == ([0], [7, 8])


def test_pages_of_a_request_that_ended_serve_the_next_one() -> None:
    scheduler = make(pages_per_group=3, prefix_cache=False)
    first = add(scheduler, 0, prompt=4, max_tokens=5)
    second = add(scheduler, 1, prompt=4, max_tokens=5)
    step(scheduler)
    page = first.pages[0]
    step(scheduler)
    commit(scheduler, (0,))
    assert rows(step(scheduler)) == [[(1, 0, (1, 2, 3, 4), 1)]]
    assert second.pages == [page]


# -- ends ------------------------------------------------------------------------------------------------------------


def test_finish_reasons() -> None:
    scheduler = make()
    by_eos = add(scheduler, 0, prompt=1, max_tokens=2)
    by_length = add(scheduler, 1, prompt=1, max_tokens=1)
    both = add(scheduler, 2, prompt=1, max_tokens=1)
    step(scheduler)
    assert commit(scheduler, (0, 5, 0)) == [by_eos, by_length, both]
    assert [r.finish_reason for r in (by_eos, by_length, both)] == ["stop", "length", "stop"]


def test_abort_removes_waiting_running_and_finished_requests() -> None:
    scheduler = make(requests_per_group=1)
    running = add(scheduler, 0, prompt=2, max_tokens=9)
    waiting = add(scheduler, 1, prompt=2, max_tokens=9)
    step(scheduler)
    scheduler.abort(waiting)
    scheduler.abort(running)
    scheduler.check_integrity()
    assert [r.finish_reason for r in (running, waiting)] == ["abort", "abort"]
    assert not scheduler.has_work and scheduler.pools[0].num_free == 16
    assert commit(scheduler, (5,)) == [] and running.output == []
    scheduler.abort(running)
    scheduler.check_integrity()
    ended = add(scheduler, 2, prompt=2, max_tokens=1)
    step(scheduler)
    commit(scheduler, (5,))
    scheduler.abort(ended)
    assert ended.finish_reason == "length"


def test_nothing_to_do_is_none() -> None:
    scheduler = make()
    assert scheduler.schedule() is None and not scheduler.has_work


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"),
    [
        (0, 5, ["the prompt is empty", "at least one token"]),
        (3, 0, ["max_tokens is 0", "at least 1"]),
        (3, -2, ["max_tokens is -2", "at least 1"]),
        (64, 5, ["prompt has 64 tokens", "context holds 64", "shorten it to 63 tokens", "--max-context"]),
        (40, 20, ["needs KV cache for 59 tokens", "a group has 32", "--kv-tokens to 59"]),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(
    prompt: int, max_tokens: int, said: list[str]
) -> None:
    scheduler = make(pages_per_group=9)
    with pytest.raises(ConfigError) as refused:
        add(scheduler, 0, prompt=prompt, max_tokens=max_tokens)
    assert [part for part in said if part not in str(refused.value)] == []
    assert "\n" not in str(refused.value)
    assert not scheduler.has_work


def test_max_tokens_is_cut_to_the_context_and_the_longest_prompt_gets_one_token() -> None:
    scheduler = make(max_context=16)
    assert add(scheduler, 0, prompt=10, max_tokens=100).max_tokens == 6
    assert add(scheduler, 1, prompt=15, max_tokens=100).max_tokens == 1


def test_tokens_per_group_leaves_out_the_null_page() -> None:
    assert Limits(page_size=4, pages_per_group=17).tokens_per_group == 64
