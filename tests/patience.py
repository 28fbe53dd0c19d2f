"""Timeouts of tests: safety nets, never asserted. `benchmarks/` has speed."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["FACTOR", "PATIENCE_S", "eventually"]


def _factor() -> float:
    """How much slower than a fast idle core this machine runs Python just now; 1 to 10."""
    start = time.perf_counter()
    sum(number * number for number in range(500_000))
    return min(max((time.perf_counter() - start) / 0.025, 1.0), 10.0)


FACTOR = _factor()
PATIENCE_S = 120 * FACTOR


def eventually(condition: Callable[[], bool], pause_s: float = 0.01) -> None:
    """Waits until it is true, for as long as the slowest machine may take."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"it did not come true within {PATIENCE_S:.0f} s"
        time.sleep(pause_s)
