"""When a step counts as stuck: by its predicted time, and by how long steps of its bucket have really taken.

Prices may be far too low (an uncalibrated GPU was 17 to 100 times slower), so they alone do not decide it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from narrows.engine.core import StepInFlight
from narrows.plan.cache import PlanKey
from narrows.ranks.timing import Timing

__all__ = ["OldestStep", "StepLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OldestStep:
    """The oldest step in flight: since when it is that, its predicted seconds, and those after which it is stuck."""

    key: tuple[PlanKey, bool]
    begun: float
    predicted_s: float
    limit_s: float


class StepLimits:
    """Watches the oldest step in flight, and keeps the longest time of each bucket of the plan cache.

    The engine's loop calls the methods; any thread may read ``oldest``. ``clock``: in seconds.
    """

    def __init__(self, timing: Timing, clock: Callable[[], float] = monotonic) -> None:
        self.oldest: OldestStep | None = None
        self._timing, self._clock = timing, clock
        self._longest_s: dict[tuple[PlanKey, bool], float] = {}

    def begun(self, step: StepInFlight) -> None:
        """``step`` is the oldest in flight from now on."""
        key = PlanKey.of_batch(step.batch), step.batch.needs_logits
        limit_s = self._timing.step_limit_s(step.expected_s, self._longest_s.get(key))
        self.oldest = OldestStep(key=key, begun=self._clock(), predicted_s=step.expected_s, limit_s=limit_s)

    def ended(self) -> None:
        """The oldest step has ended."""
        step, self.oldest = self.oldest, None
        assert step is not None, "a step ends after it has begun"
        seconds = min(self._clock() - step.begun, step.limit_s)  # beyond that, this process was suspended itself
        self._longest_s[step.key] = max(seconds, self._longest_s.get(step.key, 0.0))

    def overdue(self, more_s: float = 0.0) -> str:
        """The oldest step in words, if it has run for ``more_s`` beyond its limit; else empty."""
        step = self.oldest
        if step is None or (age_s := self._clock() - step.begun) <= step.limit_s + more_s:
            return ""
        return f"a step has not ended in {age_s:.0f} s, and {step.predicted_s:.2g} s were predicted"
