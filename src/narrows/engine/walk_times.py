"""How long each step of every walk of a plan took on a rank.

Knows bound steps and clocks; not plans. What is read is in the order of the walk, so who knows the plan that was walked
can tell which number is which step's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from narrows.comm.device import finished
from narrows.engine.program import Frame, Operation, Registers, Repeated
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["WalkTimes"]


class WalkTimes:
    """A clock around every step. A GPU is waited for after each, so that a step's time is its own."""

    def __init__(self, worker: Worker) -> None:
        self._seconds: list[float] = []
        self._device = worker.place.device

    def readings(self) -> list[float]:
        """Seconds of every step of every walk since the last call, in order."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        return _Timed(operation, self._count, self._device)

    def _count(self, seconds: float) -> None:
        self._seconds.append(seconds)


class _Timed(Repeated):
    """A bound step with the clock around it; a tape that repeats it tells the clock."""

    def __init__(self, operation: Operation, count: Callable[[float], None], device: torch.device) -> None:
        self._operation, self._count, self._device = operation, count, device

    def __call__(self, regs: Registers, frame: Frame) -> None:
        start = perf_counter()
        self._operation(regs, frame)
        finished(self._device)
        self._count(perf_counter() - start)

    def repeated(self, regs: Registers, frame: Frame) -> Callable[[float], None]:
        return self._count
