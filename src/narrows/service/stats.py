"""Counts of steps, tokens, plans and collectives, kept by the loop for other threads to read.

Totals survive the engine: new ranks continue them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from narrows.api import Stats
from narrows.engine.core import StepInFlight
from narrows.instruments.collective_clock import Counted, added
from narrows.plan.cache import bucket
from narrows.sched.stats import SchedulerStats
from narrows.service.step_times import DriftRule, StepTimes

__all__ = ["ServiceStats"]


class ServiceStats:
    """The numbers of one service. ``drift``: the watch for steps that are off their prediction."""

    def __init__(self, drift: DriftRule) -> None:
        self.drift = drift
        self._lock = threading.Lock()
        self._now: SchedulerStats | None = None
        self._before: SchedulerStats | None = None  # of engines that have failed
        self._plans: Counter[tuple[str, int, str]] = Counter()
        self._collectives: dict[tuple[str, str], Counted] = {}
        self._times = StepTimes(drift)

    # --- for any thread

    def now(self, num_arrived: int) -> Stats:
        """Numbers of this moment, and totals since the start; ``num_arrived`` wait beside those in the scheduler."""
        with self._lock:
            now = self._now
            if now is None:
                return Stats()
            values = {field.name: getattr(now, field.name) for field in fields(now)}
            values["waiting"] += num_arrived
            return Stats(
                **values,
                plans=dict(self._plans),
                plan_seconds=dict(self._times.classes),
                collectives=dict(self._collectives),
                predicted_collectives=dict(self._times.collectives),
            )

    def steps_run(self) -> dict[tuple[str, int, str], int]:
        """Steps by (phase, bucket of rows, layout)."""
        with self._lock:
            return dict(self._plans)

    def times_of_plans(self) -> dict[int, dict[str, Any]]:
        """Measured times of a plan's steps, by its ``id``."""
        with self._lock:
            return self._times.documents()

    # --- for the loop

    def scheduled(self, now: SchedulerStats) -> None:
        """The scheduler's numbers, unchanged."""
        with self._lock:
            self._now = now.after(self._before) if self._before else now

    def handed_out(self, step: StepInFlight) -> None:
        """A step that the ranks have been given."""
        with self._lock:
            self._plans[step.batch.phase, bucket(step.batch.num_rows), step.plan.layout_name] += 1

    def ended(self, step: StepInFlight, predicted: float, times: list[float]) -> str:
        """A step that is done (:meth:`StepTimes.ended`); a line for people if its bucket is off its prediction."""
        with self._lock:
            return self._times.ended(step.batch, step.plan, predicted, times)

    def add_collectives(self, ranks: Sequence[Mapping[tuple[str, str], Counted]]) -> None:
        """One reading of every rank's clock of collectives."""
        with self._lock:
            self._collectives = added(ranks, self._collectives)

    def engine_lost(self) -> None:
        """The engine has failed: current values are reset, and totals stay."""
        with self._lock:
            self._before = replace(self._now, running=0, waiting=0) if self._now else None
            self._times.forget_ranks()
