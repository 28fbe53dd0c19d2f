"""Several clients in one scheduler: none holds all running slots, pages or rows while others wait, and none starves."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from effort import examples

from narrows.errors import ConfigError
from narrows.sched.batch import Batch
from narrows.sched.sampling import SamplingParams, TokenScore
from narrows.sched.scheduler import Limits, Request, Scheduler
from narrows.sched.shares import Shares

ROOMY = 20_000


def text(
    number: int, client: str, *, prompt: int = 4, max_tokens: int = 100, priority: int = 0, scored: bool = False
) -> Request:
    """A text whose prompt no other begins with."""
    sampling = SamplingParams(prompt_logprobs=0) if scored else None
    tokens = tuple(range(number * 10_000, number * 10_000 + prompt))
    return Request(id=number, prompt=tokens, max_tokens=max_tokens, client=client, priority=priority, sampling=sampling)


def add(scheduler: Scheduler, *texts: Request) -> None:
    for each in texts:
        scheduler.add(each)


def step(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    commit(scheduler, batch)
    scheduler.check_integrity()
    return batch


def commit(scheduler: Scheduler, batch: Batch) -> None:
    scores = {slot: TokenScore(0.0, 1, ()) for _, slots in batch.scored() for slot in slots}
    scheduler.commit((7,) * batch.num_logit_rows, scores=scores)


def running_of(scheduler: Scheduler) -> Counter[str]:
    return Counter(request.client for group in scheduler.running for request in group)


def steps_until(scheduler: Scheduler, request: Request, most: int) -> int:
    """Steps until its first token."""
    for count in range(1, most + 1):
        step(scheduler)
        if request.output:
            return count
    raise AssertionError(f"no token within {most} steps")


# -- one request cannot hold everything --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (Limits(pages_per_group=ROOMY), 1),  # slots are short
        (Limits(pages_per_group=257), 1),  # pages are: two contexts, as the engine has it by default
        (Limits(num_groups=2, pages_per_group=ROOMY), 1 + 2),  # it may wait for a prompt of the other group
        (Limits(rows_per_step=256, pages_per_group=ROOMY), 1 + 1000 // 128),  # rows are: it gets its half of them
        (Limits(rows_per_step=16, pages_per_group=ROOMY), 3 + 1000 // 7),
        (Limits(rows_per_step=300, prefill_chunk=256, pages_per_group=ROOMY), 4),
    ],
)
@pytest.mark.parametrize("came_after", [3, pytest.param(60, marks=pytest.mark.full)])
def test_a_request_beside_1024_texts_gets_its_first_token_in_few_steps(
    limits: Limits, most: int, came_after: int
) -> None:
    scheduler = Scheduler(limits)
    for number in range(1024):
        flood = text(number, "flood", max_tokens=1900)
        flood.prompt = (number // 128 + 1,) * 100
        scheduler.add(flood)
    for _ in range(came_after):
        step(scheduler)
    honest = text(2000, "honest", prompt=1000, max_tokens=30)
    scheduler.add(honest)
    assert steps_until(scheduler, honest, most) <= most
    for _ in range(29):
        step(scheduler)
    assert honest.finish_reason == "length", "and a token with every step from then on"
    assert running_of(scheduler)["flood"] >= 1, "the others go on too"


def test_a_needed_place_comes_from_the_client_with_most_and_returns_later() -> None:
    scheduler = Scheduler(Limits(requests_per_group=6, pages_per_group=ROOMY))
    flood = [text(number, "flood", max_tokens=500) for number in range(9)]
    add(scheduler, *flood[:4], text(20, "other", max_tokens=500), text(21, "other", max_tokens=500))
    step(scheduler)
    add(scheduler, *flood[4:], honest := text(30, "honest", max_tokens=3))
    step(scheduler)
    assert running_of(scheduler) == {"flood": 3, "other": 2, "honest": 1}
    assert [each.id for each in scheduler.waiting] == [3, 4, 5, 6, 7, 8], "it keeps its turn"
    while not honest.finish_reason:
        step(scheduler)
    step(scheduler)
    assert running_of(scheduler) == {"flood": 4, "other": 2} and flood[3].group == 0
    assert scheduler.stats().preemptions == 1


def test_shares_become_even_and_then_preemption_stops() -> None:
    scheduler = Scheduler(Limits(requests_per_group=10, pages_per_group=ROOMY))
    for first, client in enumerate("abc"):
        add(scheduler, *(text(100 * first + number, client, max_tokens=1000) for number in range(20)))
        step(scheduler)
    assert sorted(running_of(scheduler).values()) == [3, 3, 4]
    settled = scheduler.stats().preemptions
    assert settled == 5 + 3, "the second client gets half of ten, the third a third"
    for _ in range(300):
        step(scheduler)
    assert scheduler.stats().preemptions == settled and sorted(running_of(scheduler).values()) == [3, 3, 4]


def test_a_text_is_put_back_only_for_one_that_then_fits() -> None:
    scheduler = Scheduler(Limits(pages_per_group=11, page_size=4, max_context=64))
    add(scheduler, *(text(number, "flood", prompt=8, max_tokens=2) for number in range(4)))
    add(scheduler, *(text(10 + number, "other", prompt=4, max_tokens=30) for number in range(1)))
    step(scheduler)
    running = running_of(scheduler)
    add(scheduler, text(20, "honest", prompt=38, max_tokens=2))  # ten pages: never beside the others' first texts
    step(scheduler)
    assert scheduler.stats().preemptions == 0 and running["flood"] > 1


def test_as_many_texts_are_preempted_as_pages_need_counting_shared_ones_once() -> None:
    scheduler = Scheduler(Limits(pages_per_group=13, page_size=4, max_context=64, rows_per_step=64))
    shared = tuple(range(1, 9))
    flood = [Request(id=n, prompt=(*shared, 50 + n), max_tokens=4, client="flood") for n in range(5)]
    scheduler.add(flood[0])
    step(scheduler)
    add(scheduler, *flood[1:])
    step(scheduler)
    assert running_of(scheduler)["flood"] == 5 and scheduler.pools[0].num_used == 2 + 5
    # Five pages are free. Seven are needed: each text put back frees the one that it holds alone.
    scheduler.add(honest := text(9, "honest", prompt=26, max_tokens=2))
    step(scheduler)
    assert honest.group == 0 and len(honest.output) == 1
    assert running_of(scheduler)["flood"] == 3 and scheduler.stats().preemptions == 2


# -- rows of a step ----------------------------------------------------------------------------------------------------


def test_long_prompts_of_one_client_do_not_block_anothers() -> None:
    scheduler = Scheduler(Limits(rows_per_step=64, pages_per_group=ROOMY, max_context=4000))
    add(scheduler, *(text(number, "flood", prompt=640, max_tokens=1) for number in range(1024)))
    for _ in range(25):
        step(scheduler)
    scheduler.add(honest := text(2000, "honest", prompt=70, max_tokens=5))
    assert steps_until(scheduler, honest, 12) <= 12, "the rest of one prompt, and its own two steps"


def test_scored_prompts_share_their_rows_too() -> None:
    limits = Limits(rows_per_step=64, scored_rows_per_step=8, pages_per_group=ROOMY)
    scheduler = Scheduler(limits)
    add(scheduler, *(text(number, "flood", prompt=80, max_tokens=0, scored=True) for number in range(300)))
    for _ in range(25):
        step(scheduler)
    scheduler.add(honest := text(2000, "honest", prompt=16, max_tokens=1, scored=True))
    assert steps_until(scheduler, honest, 13) <= 13


def test_texts_beyond_their_share_yield_rows_and_are_not_recomputed() -> None:
    scheduler = Scheduler(Limits(rows_per_step=8, pages_per_group=ROOMY))
    flood = [text(number, "flood", prompt=1, max_tokens=100) for number in range(8)]
    add(scheduler, *flood)
    step(scheduler)
    assert step(scheduler).num_rows == 8
    scheduler.add(honest := text(9, "honest", prompt=12, max_tokens=2))
    for _ in range(3):
        batch = step(scheduler)
        rows = Counter({chunk.request: len(chunk.tokens) for chunk in batch.groups[0]})
        assert batch.num_rows == 8 and rows[9] == 4
        assert [number for number in range(8) if rows[number]] == [0, 1, 2, 3], "those of the first turns"
    assert len(honest.output) == 1 and scheduler.stats().preemptions == 0


# -- more clients than slots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(requests_per_group=1), Limits(pages_per_group=8, page_size=4)])
def test_with_room_for_one_text_clients_take_turns(limits: Limits) -> None:
    """One slot, or pages for a single text: the client that had it last is behind those that came meanwhile."""
    scheduler = Scheduler(limits)
    flood = [text(number, "flood", prompt=16, max_tokens=12) for number in range(20)]
    add(scheduler, *flood)
    for _ in range(3):
        step(scheduler)
    honest = [text(100 + number, f"honest {number}", prompt=16, max_tokens=12) for number in range(3)]
    add(scheduler, *honest)
    while not all(each.finish_reason for each in honest):
        step(scheduler)
    assert sum(bool(each.finish_reason) for each in flood) <= 2
    while scheduler.has_work:
        step(scheduler)
    assert all(each.finish_reason == "length" for each in flood)


def test_a_second_text_is_not_starved_by_newcomers_of_one_text_each() -> None:
    scheduler = Scheduler(Limits(requests_per_group=4))
    pair = [text(number, "pair", max_tokens=30) for number in range(2)]
    add(scheduler, *pair)
    for count in range(400):
        add(scheduler, *(text(1000 + 3 * count + i, f"new {count} {i}", max_tokens=4) for i in range(3)))
        step(scheduler)
        if all(each.finish_reason for each in pair):
            break
    assert all(each.finish_reason == "length" for each in pair)


# -- priorities --------------------------------------------------------------------------------------------------------


def test_less_urgent_texts_yield_and_never_preempt() -> None:
    scheduler = Scheduler(Limits(requests_per_group=4))
    add(scheduler, *(text(number, "flood", priority=5, max_tokens=1000) for number in range(9)))
    step(scheduler)
    add(scheduler, normal := text(20, "a"), less := text(21, "b", priority=6))
    step(scheduler)
    assert (normal.group, less.group) == (0, -1)
    assert running_of(scheduler) == {"flood": 3, "a": 1}


def test_a_less_urgent_request_preempts_and_passes_no_text() -> None:
    scheduler = Scheduler(Limits(requests_per_group=4))
    add(scheduler, *(text(number, "many", max_tokens=5 if number else 2) for number in range(4)))
    step(scheduler)
    scheduler.add(less := text(20, "b", priority=1))
    step(scheduler)
    assert (running_of(scheduler), scheduler.stats().preemptions) == ({"many": 3}, 0), "the first has ended by itself"
    scheduler.add(more := text(4, "many"))
    step(scheduler)
    assert (more.group, less.group) == (0, -1)


def test_urgent_texts_run_first_and_share_among_themselves() -> None:
    scheduler = Scheduler(Limits(requests_per_group=4))
    add(scheduler, *(text(number, "urgent", priority=-100, max_tokens=1000) for number in range(9)))
    step(scheduler)
    add(scheduler, normal := text(20, "a"), urgent := text(21, "b", priority=-100))
    step(scheduler)
    assert (normal.group, urgent.group) == (-1, 0)
    assert running_of(scheduler) == {"urgent": 3, "b": 1}


def test_old_and_less_urgent_requests_have_their_turn() -> None:
    scheduler = Scheduler(Limits(requests_per_group=2, aging_steps=5))
    scheduler.add(patient := text(0, "patient", priority=2, max_tokens=2))
    for count in range(1, 40):
        add(scheduler, *(text(10 * count + i, f"client {i}", max_tokens=2) for i in range(3)))
        step(scheduler)
    assert patient.finish_reason == "length"


def test_rows_go_by_rank_but_never_before_a_more_urgent_text() -> None:
    shares = Shares(Limits(aging_steps=10))
    #                     client, priority, turn
    kinds = [("a", 0, 0), ("a", 0, 1), ("b", 0, 2), ("a", -1, -5), ("c", 1, 10), ("c", 0, 12), ("b", 0, 13)]
    texts = []
    for number, (client, priority, turn) in enumerate(kinds):
        texts.append(text(number, client, priority=priority))
        texts[-1].arrival, texts[-1].turn = number, (turn, number)
        shares.came(texts[-1])
        shares.placed(texts[-1])
    order = shares.order(texts)
    # First the urgent one (turn -5). Then the normal ones by rank: text 1, its client's third, came before the less
    # urgent one, which therefore passes none of them.
    assert [each.id for each in order] == [3, 2, 0, 5, 6, 1, 4]
    assert [each.rank for each in sorted(texts, key=lambda each: each.id)] == [1, 2, 0, 0, 0, 1, 1]


# -- everything at once ------------------------------------------------------------------------------------------------


def crowd(seed: int, name: str) -> tuple[list[Batch | None], int]:
    """The batches of many random texts; ``name``: whose they are. And the preemptions."""
    rng = Random(seed)
    chunk = rng.choice((0, 0, 3))
    limits = Limits(
        num_groups=rng.randint(1, 3),
        rows_per_step=rng.randint(3, 12),
        requests_per_group=rng.randint(1, 5),
        page_size=rng.randint(2, 4),
        pages_per_group=rng.randint(14, 22),
        max_context=26,
        prefill_chunk=chunk,
        scored_rows_per_step=max(chunk, rng.randint(0, 5)),
        aging_steps=rng.randint(0, 4),
    )
    scheduler = Scheduler(limits)
    batches: list[Batch | None] = []
    for count in range(2000):
        if count < 40:
            fields = {"prompt": rng.randint(1, 12), "max_tokens": rng.randint(1, 12), "priority": rng.randint(-1, 1)}
            scheduler.add(text(count, name.format(count), **fields, scored=rng.random() < 0.2))
        batches.append(batch := scheduler.schedule())
        if batch is not None:
            commit(scheduler, batch)
        elif count > 40:
            break
    assert not scheduler.has_work
    return batches, scheduler.stats().preemptions


@pytest.mark.slow
def test_one_client_or_one_each_gives_the_same_batches() -> None:
    preemptions = 0
    for seed in range(examples(42)):
        one, own = crowd(seed, "one"), crowd(seed, "{}")
        assert one == own
        preemptions += own[1]
    assert preemptions > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(10, 40))])
def test_no_client_gets_a_place_before_a_waiting_one_with_fewer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(seed)
    scheduler = Scheduler(
        Limits(
            num_groups=rng.randint(1, 2),
            rows_per_step=rng.randint(2, 40),
            requests_per_group=rng.randint(1, 6),
            page_size=4,
            pages_per_group=rng.randint(20, 60),
            max_context=64,
        )
    )
    placed, looked = scheduler.shares.placed, []

    def look(request: Request) -> None:
        runs = running_of(scheduler)
        runs[request.client] -= 1  # as it was before
        others = [other for other in scheduler.waiting if other.priority <= request.priority]
        assert all(runs[request.client] <= runs[other.client] for other in others)
        looked.append(len(others))
        placed(request)

    monkeypatch.setattr(scheduler.shares, "placed", look)
    for count in range(5000):
        for number in range(10 * count, 10 * count + rng.randint(0, 3) if count < 60 else 0):
            fields = {"prompt": rng.randint(1, 20), "max_tokens": rng.randint(1, 40)}
            client = rng.choice(["a", "a", "b", f"own {number}"])
            scheduler.add(text(number, client, **fields, priority=rng.choice((0, 0, 0, 1))))
        if scheduler.has_work:
            step(scheduler)
        elif count >= 60:
            break
    assert not scheduler.has_work and sum(looked) > 50


# -- how long a step may become ----------------------------------------------------------------------------------------


def test_prompts_have_few_rows_in_a_step_that_decodes() -> None:
    scheduler = Scheduler(Limits(rows_per_step=512, prompt_rows=32, pages_per_group=ROOMY))
    add(scheduler, text(0, "long", prompt=600, max_tokens=4))
    assert step(scheduler).num_rows == 512, "nobody else reads anything"
    step(scheduler)
    reader = text(1, "reader", max_tokens=60)
    add(scheduler, reader)
    step(scheduler)
    add(scheduler, text(2, "a", prompt=300), text(3, "b", prompt=300, scored=True), text(4, "b", prompt=300))
    rows = [step(scheduler) for _ in range(45)]
    ahead = [sum(len(chunk.tokens) for group in batch.groups for chunk in group if len(chunk.tokens) > 1)
             for batch in rows]  # fmt: skip
    assert max(ahead) <= 32 and len(reader.output) >= 45, "it has a token of every step"
    assert sum(ahead) >= 890, "and prompts have the rest"


def test_an_uncuttable_chunk_fits_the_prompt_rows() -> None:
    with pytest.raises(ConfigError, match="raise --prompt-rows to at least 256"):
        Limits(prefill_chunk=256, prompt_rows=64)
    Limits(prefill_chunk=256, prompt_rows=256)
