"""How long each step of a plan takes on the rank that has the most rows: what prices are made of. Runs on ranks.

Knows bound steps and clocks; not prices. Rank 0 always holds as many rows as any other, so what it takes is what the
step takes, and the wait in its collectives is what nobody could have saved by dealing rows better.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch

from narrows.comm.device import finished
from narrows.engine.program import Frame, Operation, Registers
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["PriceClock", "StepKey", "Timed", "Walk", "step_key"]


class StepKey(NamedTuple):
    """What tells the steps of one plan apart, less the layer."""

    kind: str
    name: str
    boundary: str
    reads: tuple[str, ...]
    layouts: str
    row_set: str


class Timed(NamedTuple):
    """Calls of one kind of step in a walk, and the seconds of all."""

    calls: int = 0
    seconds: float = 0.0


Walk = dict[StepKey, Timed]
"""One walk of a plan, by kind of step."""


def step_key(step: Step) -> StepKey:
    """The key of a step; a norm that adds the residual reads more than one that does not."""
    layouts = f"{','.join(map(str, step.reads_at))} -> {','.join(map(str, step.writes_at))}"
    return StepKey(step.kind.value, step.name, step.boundary, step.reads, layouts, step.row_set.value)


class PriceClock:
    """A clock around every step of one rank; an instrument of :meth:`Engine.instrument`."""

    def __init__(self, worker: Worker) -> None:
        self._walks: list[Walk] = []
        self._device = worker.place.device

    def readings(self) -> list[Walk]:
        """Every walk since the last call, in order."""
        found, self._walks = self._walks, []
        return found

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        return _Timed(operation, partial(self._count, step_key(step), "ids" in step.reads), self._device)

    def _count(self, key: StepKey, begins: bool, seconds: float) -> None:
        if begins:
            self._walks.append({})
        walk = self._walks[-1]
        old = walk.get(key, Timed())
        walk[key] = Timed(old.calls + 1, old.seconds + seconds)


class _Timed:
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
