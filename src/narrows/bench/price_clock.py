"""How long each step of a plan takes on the rank that has the most rows: what prices are made of. Runs on ranks.

Knows bound steps and clocks; not prices. Rank 0 always holds as many rows as any other, so what it takes is what the
step takes, and the wait in its collectives is what nobody could have saved by dealing rows better.
"""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from narrows.comm.device import finished
from narrows.engine.program import Frame, Operation, Registers
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["PriceClock", "StepKey", "Timed", "step_key"]


class StepKey(NamedTuple):
    """What tells the steps of one plan apart, less the layer."""

    kind: str
    name: str
    boundary: str
    reads: tuple[str, ...]
    layouts: str
    row_set: str


class Timed(NamedTuple):
    """Calls of one kind of step, and the seconds of all."""

    calls: int = 0
    seconds: float = 0.0


def step_key(step: Step) -> StepKey:
    """The key of a step; a norm that adds the residual reads more than one that does not."""
    layouts = f"{','.join(map(str, step.reads_at))} -> {','.join(map(str, step.writes_at))}"
    return StepKey(step.kind.value, step.name, step.boundary, step.reads, layouts, step.row_set.value)


class PriceClock:
    """A clock around every step of one rank; an instrument of :meth:`Engine.instrument`."""

    def __init__(self, worker: Worker) -> None:
        self._found: dict[StepKey, Timed] = {}
        self._device = worker.place.device

    def readings(self) -> dict[StepKey, Timed]:
        """By kind of step; begins anew."""
        found, self._found = self._found, {}
        return found

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        key = step_key(step)

        def timed(regs: Registers, frame: Frame) -> None:
            start = perf_counter()
            operation(regs, frame)
            finished(self._device)
            seconds = perf_counter() - start
            old = self._found.get(key, Timed())
            self._found[key] = Timed(old.calls + 1, old.seconds + seconds)

        return timed
