"""New ranks take the place of failed ones, unless those have failed soon after they were ready."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from narrows.errors import RankError
from narrows.service.queue import RequestQueue
from narrows.service.recovery import Recovery


def _loop() -> Any:
    """The loop of an engine that runs no request."""
    return SimpleNamespace(end_failed=lambda reason, *, all_of_them: [], engine=SimpleNamespace(close=lambda: None))


class Ranks:
    """Ranks that take some seconds to load, by a clock that only the test and the loading move."""

    def __init__(self, load_s: float) -> None:
        self.now, self.load_s = 1000.0, load_s
        self.recovery = Recovery(self.start, RequestQueue(8, lambda: None), restart=True, clock=lambda: self.now)

    def start(self) -> Any:
        self.now += self.load_s
        return _loop()

    def fail_after(self, seconds: float) -> bool:
        """Whether new ranks serve after those of now have failed, so long after they were ready."""
        self.now += seconds
        return self.recovery.after(_loop(), RankError("rank 0 is gone"), []) is not None


def test_ranks_that_fail_within_a_minute_of_being_ready_are_not_replaced_however_long_they_load() -> None:
    for load_s in (0.0, 59.0, 61.0, 600.0):
        ranks = Ranks(load_s)
        assert ranks.fail_after(1.0), "the first failure"
        assert ranks.fail_after(61.0), "a failure after a minute is a new one"
        assert not ranks.fail_after(59.0)
        assert "rank 0 is gone" in ranks.recovery.failure and ranks.recovery.num_restarts == 2
