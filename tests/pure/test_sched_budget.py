"""How many rows of prompts a step may have: by ``Limits.prompt_rows``, or by any function of its decode rows."""

from __future__ import annotations

from collections.abc import Sequence

from narrows.sched.batch import Batch
from narrows.sched.budget import PromptBudget
from narrows.sched.scheduler import Limits, Request, Scheduler


def request(length: int, **more: int) -> Request:
    return Request(id=more.pop("id"), prompt=tuple(range(length)), max_tokens=20, **more)  # type: ignore[arg-type]


def prompt_rows(batch: Batch) -> int:
    return sum(len(chunk.tokens) for group in batch.groups for chunk in group if len(chunk.tokens) > 1)


def run(limits: Limits, budget: PromptBudget | None = None) -> list[tuple[int, int]]:
    """(decode rows, rows of prompts) of each step while two texts run and two long prompts come."""
    scheduler = Scheduler(limits, budget)
    for number in range(2):
        scheduler.add(request(4, id=number))
    found = []
    for step in range(12):
        if step == 2:
            for number in (2, 3):
                scheduler.add(request(100, id=number))
        batch = scheduler.schedule()
        assert batch is not None
        found.append((batch.num_rows - prompt_rows(batch), prompt_rows(batch)))
        scheduler.commit((7,) * len(batch.samples()))
    return found


def test_prompt_rows_bound_only_steps_that_decode() -> None:
    steps = run(Limits(num_groups=2, rows_per_step=90, prompt_rows=30, align_steps=0))
    assert steps[0] == (0, 8)
    assert max(rows for decoding, rows in steps if decoding) == 30


def test_a_budget_sees_the_decode_rows_of_each_group_and_the_rows_left() -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    def budget(decoding: Sequence[int], left: int) -> int:
        seen.append((tuple(decoding), left))
        return 10 * sum(decoding) or left

    steps = run(Limits(num_groups=2, rows_per_step=90, align_steps=0), budget)
    assert seen[0] == ((0, 0), 90) and seen[1] == ((1, 1), 88)
    assert all(rows <= 10 * decoding for decoding, rows in steps[1:])
    assert sum(rows for _, rows in steps) == 208, "all prompts ran"


def test_a_budget_above_the_rows_left_is_cut_to_them() -> None:
    steps = run(Limits(num_groups=2, rows_per_step=90, align_steps=0), lambda _, left: 10 * left)
    assert max(decoding + rows for decoding, rows in steps) == 90
