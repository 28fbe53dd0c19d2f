"""Counts the experts that decode steps really send rows to. An instrument; knows bound steps, changes nothing."""

from __future__ import annotations

from narrows.engine.program import Frame, Operation, Registers
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["ExpertCounter"]

Hits = dict[int, tuple[int, int]]
"""By the rows of the step: (layers counted, experts hit in them)."""


class ExpertCounter:
    """Looks at what the experts' stage is given, which is all rows on every rank, in decode steps."""

    def __init__(self, worker: Worker) -> None:
        self._hits: Hits = {}

    def readings(self) -> Hits:
        hits, self._hits = self._hits, {}
        return hits

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        if step.name != "experts":
            return operation
        at = reads[step.reads.index("topk_ids")]

        def counted(regs: Registers, frame: Frame) -> None:
            if frame.phase == "decode":
                ids = regs[at]
                layers, hit = self._hits.get(len(ids), (0, 0))
                self._hits[len(ids)] = layers + 1, hit + ids.unique().numel()
            operation(regs, frame)

        return counted
