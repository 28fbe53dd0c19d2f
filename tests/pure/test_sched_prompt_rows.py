"""How rows of a step are shared among prompts of several groups: an algebra, for any prompts, budgets and chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from narrows.sched.chunks import next_rows
from narrows.sched.limits import Limits
from narrows.sched.prompt_rows import has_row_left, share_rows
from narrows.sched.request import Request
from narrows.sched.sampling import SamplingParams

GROUPS = 4


def prompt(number: int, group: int, rows: int, scored: bool = False) -> Request:
    sampling = SamplingParams(prompt_logprobs=0) if scored else None
    return Request(id=number, prompt=(1,) * rows, max_tokens=1, sampling=sampling, group=group)


def prompts(*, scored: bool) -> st.SearchStrategy[list[Request]]:
    one = st.tuples(st.integers(0, GROUPS - 1), st.integers(1, 40), st.booleans() if scored else st.just(False))
    return st.lists(one, max_size=14).map(
        lambda found: [prompt(number, group, rows, scores) for number, (group, rows, scores) in enumerate(found)]
    )


def limits(*, chunk: int = 0, scored: int = 0) -> Limits:
    return Limits(num_groups=GROUPS, prefill_chunk=chunk, scored_rows_per_step=scored)


def by_group(shared: dict[Request, int]) -> list[int]:
    rows = Counter[int]()
    for request, count in shared.items():
        rows[request.group] += count
    return [rows[group] for group in range(GROUPS)]


def one_group_dealt(queue: Sequence[Request], budget: int, limits: Limits) -> dict[Request, int]:
    """The rule for one group, written plainly: by turn; only requests that wait for scored rows are passed."""
    shared: dict[Request, int] = {}
    scored = limits.scored_rows
    for request in queue:
        most = min(budget, scored) if request.scores_prompt else budget
        rows = 0
        while rows < request.rows_left and (more := next_rows(request, most - rows, limits, rows)) > 0:
            rows += more
        if rows:
            shared[request] = rows
        budget, scored = budget - rows, scored - rows * request.scores_prompt
        if rows == request.rows_left:
            continue
        if not request.scores_prompt or not next_rows(request, budget, limits, rows):
            break  # no request passes a chunk that does not fit at all
        scored = 0
    return shared


@given(prompts(scored=False), st.integers(0, 150))
def test_groups_have_equal_shares_and_no_row_is_lost(queue: list[Request], budget: int) -> None:
    shared = share_rows([queue], budget, limits())
    rows, left = by_group(shared), [each for each in queue if shared.get(each, 0) < each.rows_left]
    assert sum(rows) == min(budget, sum(each.rows_left for each in queue)), "lost, or more than there are"
    assert all(shared[each] <= each.rows_left for each in shared)
    for waits in left:
        assert max(rows) <= rows[waits.group] + 1, "another group has more than its share"
        behind = [each for each in queue[queue.index(waits) + 1 :] if each.group == waits.group]
        assert not any(shared.get(each) for each in behind), "passed in its own group"


def test_unused_shares_go_to_other_groups_and_the_remainder_by_turn() -> None:
    queue = [prompt(0, 3, 100), prompt(1, 0, 2), prompt(2, 1, 100), prompt(3, 1, 100), prompt(4, 0, 3)]
    assert by_group(share_rows([queue], 41, limits())) == [5, 18, 0, 18]
    assert by_group(share_rows([queue], 42, limits())) == [5, 18, 0, 19]
    assert by_group(share_rows([queue[:1]], 60, limits())) == [0, 0, 0, 60]


@given(prompts(scored=True), st.integers(0, 150), st.integers(0, 40))
def test_scored_prompts_have_a_budget_of_their_own_which_groups_share(
    queue: list[Request], budget: int, scored: int
) -> None:
    found = limits(scored=scored)
    shared = share_rows([queue], budget, found)
    rows = sum(shared.values())
    scores = sum(count for each, count in shared.items() if each.scores_prompt)
    assert rows <= budget and scores <= found.scored_rows
    left = [each for each in queue if shared.get(each, 0) < each.rows_left]
    if any(not each.scores_prompt for each in left):
        assert rows == budget, "a plain prompt waits, and rows are left"
    elif left:
        assert rows == budget or scores == found.scored_rows, "a scored prompt waits, and its rows are left"


def test_scored_rows_are_not_one_groups() -> None:
    queue = [prompt(number, number % 2, 50, scored=True) for number in range(4)]
    queue += [prompt(10 + group, group, 50) for group in range(2)]
    shared = share_rows([queue], 64, limits(scored=10))
    assert [shared.get(each, 0) for each in queue] == [5, 5, 0, 0, 27, 27]


@given(prompts(scored=True), st.integers(0, 150), st.integers(1, 9), st.integers(0, 40))
def test_chunks_stay_whole_and_groups_differ_by_one_of_them(
    queue: list[Request], budget: int, chunk: int, scored: int
) -> None:
    found = limits(chunk=chunk, scored=max(scored, chunk))
    shared = share_rows([queue], budget, found)
    assert sum(shared.values()) <= budget
    assert sum(rows for each, rows in shared.items() if each.scores_prompt) <= found.scored_rows
    for each, rows in shared.items():
        assert rows == each.rows_left or rows % chunk == 0, "a chunk was cut"
    left = [each for each in queue if shared.get(each, 0) < each.rows_left]
    plain = [each for each in left if not each.scores_prompt]
    if plain:
        assert sum(shared.values()) > budget - chunk, "a chunk would have fitted"
    if all(not each.scores_prompt for each in queue):
        rows = by_group(shared)
        assert all(max(rows) < rows[each.group] + 2 * chunk for each in plain), "another has two chunks more"


def test_no_smaller_chunk_of_another_group_passes_one_that_does_not_fit() -> None:
    queue = [prompt(0, 0, 8), prompt(1, 1, 8), prompt(2, 2, 2)]
    assert by_group(share_rows([queue], 11, limits(chunk=8))) == [8, 0, 0, 0]


def test_the_next_chunk_goes_to_the_group_that_has_least() -> None:
    queue = [prompt(0, 0, 8), prompt(1, 1, 1), prompt(2, 1, 8)]
    assert by_group(share_rows([queue], 9, limits(chunk=4))) == [4, 5, 0, 0]


@given(prompts(scored=True), st.integers(0, 150), st.integers(0, 9), st.integers(0, 40))
def test_one_group_is_served_by_turn(queue: list[Request], budget: int, chunk: int, scored: int) -> None:
    found = limits(chunk=chunk, scored=max(scored, chunk))
    alone = [prompt(each.id, 2, each.rows_left, each.scores_prompt) for each in queue]
    assert share_rows([alone], budget, found) == one_group_dealt(alone, budget, found)


@given(prompts(scored=False), prompts(scored=False), st.integers(0, 150))
def test_a_later_wave_gets_the_rows_left_by_earlier_ones(
    first: list[Request], later: list[Request], budget: int
) -> None:
    shared = share_rows([first, later], budget, limits())
    alone = share_rows([first], budget, limits())
    assert {each: rows for each, rows in shared.items() if each in first} == alone
    assert sum(shared.values()) == min(budget, sum(each.rows_left for each in first + later))


@given(prompts(scored=False), st.integers(0, GROUPS - 1), st.integers(0, 150))
def test_a_request_is_admitted_where_it_would_get_a_row(queue: list[Request], group: int, budget: int) -> None:
    """``has_row_left`` says so without sharing; at the very end of the budget, where rows do not divide, it may be one
    row too hopeful."""
    ahead = [sum(each.rows_left for each in queue if each.group == other) for other in range(GROUPS)]
    newcomer = prompt(99, group, 1)
    gets = share_rows([[*queue, newcomer]], budget, limits()).get(newcomer, 0)
    if gets:
        assert has_row_left(ahead, [group], budget)
    elif has_row_left(ahead, [group], budget):
        assert sum(min(rows, ahead[group] + 1) for rows in ahead) + 1 > budget
    assert not has_row_left(ahead, [], budget)
