"""The scheduler's rules one by one: budget, admission, groups, running ahead, ends, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from narrows.errors import ConfigError
from narrows.sched.batch import Batch, sample_ref
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


def test_a_long_prompt_is_cut_into_chunks_of_the_budget_and_only_the_last_asks_for_logits() -> None:
    scheduler = make(rows_per_step=4)
    add(scheduler, 0, prompt=10, max_tokens=3)
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4), 0)]]
    assert rows(step(scheduler)) == [[(0, 4, (5, 6, 7, 8), 0)]]
    assert commit(scheduler, ()) == []
    assert rows(step(scheduler)) == [[(0, 8, (9, 10), 1)]]


def test_decode_rows_come_first_and_prompts_share_what_is_left_first_come_first_served() -> None:
    scheduler = make(rows_per_step=6)
    add(scheduler, 0, prompt=2, max_tokens=5)
    step(scheduler)
    add(scheduler, 1, prompt=4, max_tokens=2)
    add(scheduler, 2, prompt=4, max_tokens=2)
    batch = step(scheduler)
    assert rows(batch) == [[(0, 2, (sample_ref(0),), 1), (1, 0, (1, 2, 3, 4), 1), (2, 0, (1,), 0)]]
    assert batch.num_rows == 6


def test_more_requests_than_the_budget_wait_their_turn_and_all_end() -> None:
    scheduler = make(rows_per_step=1, num_groups=2)
    requests = [add(scheduler, i, prompt=2, max_tokens=3, eos=frozenset()) for i in range(5)]
    for _ in range(100):
        batch = scheduler.schedule()
        if batch is None:
            break
        assert batch.num_rows == 1
        commit(scheduler, [7] * batch.num_logit_rows)
    assert [(r.output, r.finish_reason) for r in requests] == [([7, 7, 7], "length")] * 5


# -- prompts cut at fixed places -------------------------------------------------------------------------------------


def test_prompts_are_cut_at_multiples_of_the_chunk_however_many_fit_into_the_step() -> None:
    scheduler = make(rows_per_step=10, prefill_chunk=4)
    add(scheduler, 0, prompt=11, max_tokens=3)
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4), 0), (0, 4, (5, 6, 7, 8), 0)]]
    assert rows(step(scheduler)) == [[(0, 8, (9, 10, 11), 1)]]


def test_a_chunk_that_does_not_fit_beside_the_others_waits_and_nobody_passes_it() -> None:
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


def test_a_request_is_admitted_only_when_all_its_pages_are_free() -> None:
    scheduler = make(pages_per_group=6)  # five pages of 4 tokens
    first = add(scheduler, 0, prompt=5, max_tokens=8, eos=frozenset())  # 12 tokens enter the cache: 3 pages
    second = add(scheduler, 1, prompt=1, max_tokens=9)  # 9 tokens: 3 pages, 2 are free
    third = add(scheduler, 2, prompt=1, max_tokens=1)  # 1 page would be free, but it came later
    assert rows(step(scheduler)) == [[(0, 0, (1, 2, 3, 4, 5), 1)]]
    assert (len(first.pages), second.group, third.group) == (3, -1, -1)
    scheduler.abort(first)
    assert rows(step(scheduler)) == [[(1, 0, (1,), 1), (2, 0, (1,), 1)]]


def test_pages_cover_the_prompt_and_every_sample_but_the_last() -> None:
    scheduler = make(page_size=4)
    exact = add(scheduler, 0, prompt=5, max_tokens=4)  # 8 tokens
    more = add(scheduler, 1, prompt=5, max_tokens=5)  # 9 tokens
    step(scheduler)
    assert (len(exact.pages), len(more.pages)) == (2, 3)


def test_a_chunk_lists_the_pages_of_its_tokens_only() -> None:
    scheduler = make(rows_per_step=6, page_size=4)
    request = add(scheduler, 0, prompt=9, max_tokens=8)
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [2]
    assert [len(c.pages) for c in step(scheduler).groups[0]] == [3]
    assert len(request.pages) == 4


def test_no_more_requests_per_group_than_the_limit() -> None:
    scheduler = make(num_groups=2, requests_per_group=1)
    for number in range(3):
        add(scheduler, number, prompt=2, max_tokens=2)
    assert [len(group) for group in step(scheduler).groups] == [1, 1]
    assert [request.id for request in scheduler.waiting] == [2]


def test_a_request_goes_to_the_group_with_the_most_free_pages_the_first_at_a_tie() -> None:
    scheduler = make(num_groups=3)
    sizes = (20, 4, 8, 4, 1)  # pages: 5, 1, 2, 1, 1
    requests = [add(scheduler, i, prompt=size, max_tokens=1) for i, size in enumerate(sizes)]
    step(scheduler)
    assert [request.group for request in requests] == [0, 1, 2, 1, 1]


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


def test_no_row_is_scheduled_past_max_tokens_however_far_ahead() -> None:
    scheduler = make()
    request = add(scheduler, 0, prompt=2, max_tokens=2)
    step(scheduler)
    step(scheduler)
    commit(scheduler, (5,))
    assert scheduler.schedule() is None and scheduler.has_work
    assert commit(scheduler, (6,)) == [request]
    assert (request.output, request.finish_reason, scheduler.has_work) == ([5, 6], "length", False)


def test_an_end_found_one_step_late_drops_the_extra_sample_and_frees_the_pages() -> None:
    scheduler = make()
    request = add(scheduler, 0, prompt=2, max_tokens=9)
    other = add(scheduler, 1, prompt=2, max_tokens=9)
    step(scheduler)
    step(scheduler)
    assert commit(scheduler, (0, 7)) == [request, other]  # eos
    assert (request.finish_reason, request.pages) == ("stop", ())
    assert scheduler.pools[0].num_free == 16 - len(other.pages)
    assert rows(step(scheduler)) == [[(1, 3, (sample_ref(1),), 1)]]  # slot 1 of a step that still had both
    assert commit(scheduler, (5, 8)) == [other]
    assert (request.output, other.output) == ([0], [7, 8])


def test_pages_of_a_request_that_ended_serve_the_next_one() -> None:
    scheduler = make(pages_per_group=3)
    first = add(scheduler, 0, prompt=4, max_tokens=5)
    second = add(scheduler, 1, prompt=4, max_tokens=5)
    step(scheduler)
    pages = first.pages
    step(scheduler)
    commit(scheduler, (0,))
    assert rows(step(scheduler)) == [[(1, 0, (1, 2, 3, 4), 1)]]
    assert second.pages == pages


# -- ends ------------------------------------------------------------------------------------------------------------


def test_finish_reasons() -> None:
    scheduler = make()
    by_eos = add(scheduler, 0, prompt=1, max_tokens=2)
    by_length = add(scheduler, 1, prompt=1, max_tokens=1)
    both = add(scheduler, 2, prompt=1, max_tokens=1)
    step(scheduler)
    assert commit(scheduler, (0, 5, 0)) == [by_eos, by_length, both]
    assert [r.finish_reason for r in (by_eos, by_length, both)] == ["stop", "length", "stop"]


def test_abort_takes_a_request_out_whether_it_waits_runs_or_has_ended() -> None:
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


# -- what is refused -------------------------------------------------------------------------------------------------


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
