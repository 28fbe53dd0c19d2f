"""A step counts as stuck by its price and by what steps of its bucket have taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from narrows.ranks.timing import TIMING
from narrows.service.step_limit import StepLimits


class Steps:
    """One step after another, by a clock that the test moves; each bucket has one number of rows."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.limits = StepLimits(TIMING, clock=lambda: self.now)

    def begin(self, rows: int, predicted_s: float) -> None:
        batch = SimpleNamespace(phase="decode", group_rows=(rows,), num_logit_rows=rows, needs_logits=False)
        step: Any = SimpleNamespace(batch=batch, expected_s=predicted_s)
        self.limits.begun(step)

    def run(self, rows: int, predicted_s: float, seconds: float) -> bool:
        """Whether a step of so many seconds never counts as stuck."""
        self.begin(rows, predicted_s)
        self.now += seconds
        fine = not self.limits.overdue()
        self.limits.ended()
        return fine


@pytest.mark.parametrize("times_too_low", [1, 17, 100])
def test_prices_far_too_low_do_not_make_a_step_stuck(times_too_low: int) -> None:
    for predicted_s in (0.001, 0.1, 2.0):
        steps = Steps()
        seconds = times_too_low * predicted_s
        assert all(steps.run(8, predicted_s, seconds * noise) for noise in (1.0, 1.0, 3.0, 0.5, 10.0))


def test_a_step_that_does_not_end_is_stuck_after_its_limit() -> None:
    steps = Steps()
    assert steps.run(8, 0.5, 2.0)
    assert steps.run(8, 0.5, 1.0)
    for rows, limit_s in ((8, 10 + 20 * 0.5 + 5 * 2.0), (16, 10 + 20 * 0.5 + 300)):
        steps.begin(rows, 0.5)
        steps.now += limit_s
        assert not steps.limits.overdue()
        steps.now += 0.6
        assert steps.limits.overdue() == f"a step has not ended in {limit_s + 1:.0f} s, and 0.5 s were predicted"
        assert not steps.limits.overdue(more_s=1.0)
        steps.now += 0.6
        assert steps.limits.overdue(more_s=1.0)


def test_a_suspended_process_does_not_learn_its_own_sleep() -> None:
    steps = Steps()
    steps.run(8, 0.5, 1.0)
    steps.run(8, 0.5, 3600.0)
    steps.begin(8, 0.5)
    steps.now += 10 + 20 * 0.5 + 5 * 25 + 1
    assert steps.limits.overdue()


def test_nothing_is_stuck_while_no_step_runs() -> None:
    steps = Steps()
    steps.run(8, 0.5, 1.0)
    steps.now += 3600.0
    assert not steps.limits.overdue()
