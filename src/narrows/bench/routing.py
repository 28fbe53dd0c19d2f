"""Instruments that look at which experts steps send rows to."""

from __future__ import annotations

from torch import Tensor

from narrows.engine.program import Frame, Operation, Registers
from narrows.engine.worker import Worker
from narrows.plan.plan import Op

__all__ = ["ExpertChoices", "ExpertCounter"]

Hits = dict[int, tuple[int, int]]
"""By the rows of the step: (layers counted, experts hit in them)."""


class _ExpertWatch:
    """Looks at what the experts' stage is given, which is all rows on every rank, in the steps of which this rank's
    group prefills, or in the others."""

    prefills: bool

    def see(self, ids_TK: Tensor) -> None:
        """The experts of all rows in one layer of one step."""
        raise NotImplementedError

    def __call__(
        self, layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        if op.name != "experts":
            return operation
        at = reads[op.reads.index("topk_ids")]

        def watched(regs: Registers, frame: Frame) -> None:
            if bool(frame.inputs.rows.prefills) == self.prefills:
                self.see(regs[at])
            operation(regs, frame)

        return watched


class ExpertCounter(_ExpertWatch):
    """Counts the experts that decode steps hit."""

    prefills = False

    def __init__(self, worker: Worker) -> None:
        self._hits: Hits = {}

    def readings(self) -> Hits:
        hits, self._hits = self._hits, {}
        return hits

    def see(self, ids_TK: Tensor) -> None:
        layers, hit = self._hits.get(len(ids_TK), (0, 0))
        self._hits[len(ids_TK)] = layers + 1, hit + len(set(ids_TK.flatten().tolist()))


class ExpertChoices(_ExpertWatch):
    """Keeps the experts of every row of prefill steps: one tensor [T, K] for each layer of each step."""

    prefills = True

    def __init__(self, worker: Worker) -> None:
        self._ids: list[Tensor] = []

    def readings(self) -> list[Tensor]:
        ids, self._ids = self._ids, []
        return ids

    def see(self, ids_TK: Tensor) -> None:
        self._ids.append(ids_TK.clone())
