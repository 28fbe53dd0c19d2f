"""How long walks of a plan took on a rank: each as a whole, or each step of them. Two instruments.

Knows bound steps and clocks; not plans. What they read is in the order of the walk, so who knows the plan that was
walked can tell which number is which step's. A clock around every step slows a decode step; around a walk it does not.
"""

from __future__ import annotations

from time import perf_counter

from narrows.comm.device import finished
from narrows.engine.program import Frame, Operation, Registers
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["StepTimes", "WalkTimes"]


class StepTimes:
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
        def timed(regs: Registers, frame: Frame) -> None:
            start = perf_counter()
            operation(regs, frame)
            finished(self._device)
            self._seconds.append(perf_counter() - start)

        return timed


class WalkTimes:
    """Clocks around the steps before and after the layers only; a walk is from the first's start to the last's end."""

    def __init__(self, worker: Worker) -> None:
        self._stamps: list[tuple[float, float]] = []
        self._device = worker.place.device

    def readings(self) -> list[tuple[float, float]]:
        """Start and end of every step outside the layers, of every walk since the last call, in order."""
        stamps, self._stamps = self._stamps, []
        return stamps

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        if layer is not None:
            return operation

        def stamped(regs: Registers, frame: Frame) -> None:
            start = perf_counter()
            operation(regs, frame)
            finished(self._device)
            self._stamps.append((start, perf_counter()))

        return stamped
