"""Guides whose masks come late: only their requests wait, also through preemption, and continue with the mask."""

from __future__ import annotations

from collections.abc import Callable

from narrows.sched.batch import Batch
from narrows.sched.guide import Guide
from narrows.sched.scheduler import Limits, Request, Scheduler

ANY, NOTHING = b"\xff\xff", b"\x00\x00"


class Held(Guide):
    """The first mask is ready; each later one when the test delivers it."""

    def __init__(self, mask: bytes | None = ANY) -> None:
        self.mask = mask
        self.taken: list[int] = []
        self.has_ended = False
        self._call: Callable[[], None] = lambda: None

    def allowed(self) -> bytes:
        assert self.mask is not None, "asked for a mask that is not there"
        return self.mask

    def advance(self, token: int) -> None:
        self.taken.append(token)
        self.mask = None

    @property
    def ready(self) -> bool:
        return self.mask is not None

    def when_ready(self, call: Callable[[], None]) -> None:
        self._call = call
        if self.ready:
            call()

    def bring(self, mask: bytes = ANY) -> None:
        self.mask = mask
        self._call()

    def end(self) -> None:
        self.has_ended = True


def make(**limits: int) -> Scheduler:
    defaults = {"rows_per_step": 8, "page_size": 4, "pages_per_group": 17, "max_context": 64}
    return Scheduler(Limits(**{**defaults, **limits}))


def add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int, guide: Guide | None = None) -> Request:
    request = Request(id=number, prompt=tuple(range(1, prompt + 1)), max_tokens=max_tokens, guide=guide)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> Batch | None:
    """One step and its result, token 8 for every row."""
    batch = scheduler.schedule()
    scheduler.check_integrity()
    if batch is not None:
        scheduler.commit((8,) * batch.num_logit_rows)
        scheduler.check_integrity()
    return batch


def rows(batch: Batch | None) -> list[int]:
    return [chunk.request for group in batch.groups for chunk in group] if batch is not None else []


def test_a_request_with_a_late_mask_has_no_row_and_others_keep_theirs() -> None:
    scheduler, guide = make(), Held()
    late, other = add(scheduler, 0, 2, 4, guide), add(scheduler, 1, 2, 6)
    assert rows(step(scheduler)) == [0, 1]
    assert guide.taken == [8] and scheduler.late == [late]
    assert [rows(step(scheduler)) for _ in range(3)] == [[1], [1], [1]]
    assert scheduler.settle() == [] and rows(step(scheduler)) == [1]
    guide.bring()
    assert rows(step(scheduler)) == [1]  # seen when it is looked for, not amid a step
    assert other.finish_reason == "length"
    assert scheduler.settle() == [] and scheduler.late == []
    batch = step(scheduler)
    assert rows(batch) == [0] and batch is not None and batch.groups[0][0].allowed == ANY
    assert late.output == [8, 8] and guide.taken == [8, 8]


def test_no_step_runs_while_every_mask_is_late() -> None:
    scheduler, guide = make(), Held()
    request = add(scheduler, 0, 2, 2, guide)
    step(scheduler)
    assert scheduler.has_work and scheduler.schedule() is None and scheduler.schedule() is None
    guide.bring()
    scheduler.settle()
    assert rows(step(scheduler)) == [0] and request.finish_reason == "length"


def test_a_late_mask_that_allows_nothing_ends_the_text_when_it_comes() -> None:
    scheduler, guide = make(), Held()
    request = add(scheduler, 0, 2, 9, guide)
    step(scheduler)
    assert not request.finish_reason
    guide.bring(NOTHING)
    assert scheduler.settle() == [request]
    assert (request.finish_reason, request.output, guide.has_ended) == ("stop", [8], True)
    assert scheduler.settle() == [] and not scheduler.has_work
    assert scheduler.stats().kv_pages_used == 0


def test_a_first_mask_may_be_late_too() -> None:
    scheduler, guide, never = make(), Held(None), Held(None)
    first, second = add(scheduler, 0, 2, 1, guide), add(scheduler, 1, 2, 1, never)
    assert scheduler.late == [first, second] and scheduler.schedule() is None
    guide.bring()
    never.bring(NOTHING)
    assert scheduler.settle() == [second] and second.finish_reason == "stop"
    assert rows(step(scheduler)) == [0] and first.finish_reason == "length"
    assert scheduler.stats().kv_pages_used == 0


def test_an_abort_with_a_late_mask_frees_the_pages_and_drops_the_mask() -> None:
    scheduler, guide = make(), Held()
    request = add(scheduler, 0, 6, 9, guide)
    step(scheduler)
    assert scheduler.stats().kv_pages_used > 0
    scheduler.abort(request)
    assert scheduler.late == [] and guide.has_ended and scheduler.stats().kv_pages_used == 0
    guide.bring()
    assert scheduler.settle() == [] and scheduler.schedule() is None and not scheduler.has_work


def test_a_request_preempted_with_a_late_mask_returns_with_its_mask() -> None:
    scheduler = make(pages_per_group=5, max_context=16)  # four pages that can be used
    guide = Held()
    first = add(scheduler, 0, 4, 12)
    late = add(scheduler, 1, 4, 12, guide)
    step(scheduler)
    while not scheduler.stats().preemptions:
        assert rows(step(scheduler)) == [0]
    assert late.group == -1 and late in scheduler.waiting and scheduler.late == [late]
    guide.bring()
    scheduler.settle()
    while not first.finish_reason:
        step(scheduler)
    assert late.output == [8]
    batch = step(scheduler)
    assert rows(batch) == [1] and batch is not None
    chunk = batch.groups[0][0]
    assert (chunk.start + len(chunk.tokens), chunk.allowed) == (5, ANY)  # the prompt and its one token, again
    assert late.output == [8, 8] and guide.taken == [8, 8]


def test_a_readmitted_request_still_waits_for_its_mask() -> None:
    scheduler = make(pages_per_group=5, max_context=16)
    guide = Held()
    first = add(scheduler, 0, 4, 12)
    late = add(scheduler, 1, 4, 12, guide)
    while not first.finish_reason:
        step(scheduler)
    assert scheduler.stats().preemptions == 1
    for _ in range(3):
        assert scheduler.schedule() is None
        scheduler.check_integrity()
    guide.bring(NOTHING)
    assert scheduler.settle() == [late] and scheduler.stats().kv_pages_used == 0


def test_masks_that_come_before_the_next_step_change_no_step() -> None:
    def steps(held: bool) -> list[list[int]]:
        scheduler = make(rows_per_step=4)
        guides = [Held() for _ in range(3)]
        for number, guide in enumerate(guides):
            add(scheduler, number, 3 + number, 3, guide if held else None)
        seen = []
        while scheduler.has_work:
            seen.append(rows(step(scheduler)))
            for guide in guides:
                guide.bring()
            scheduler.settle()
        return seen

    assert steps(True) == steps(False)
