"""The calls that an engine makes to its ranks, as the methods of one Protocol.

A call is named by a method of :class:`RankWorker` and typed by it; :class:`~narrows.engine.worker.Worker` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from narrows.engine.program import Wrap
from narrows.engine.step_record import Reader
from narrows.engine.worker import StepResult, Worker
from narrows.plan.plan import Plan
from narrows.sched.batch import Batch

__all__ = ["RankWorker"]


class RankWorker(Protocol):
    """The calls of an engine's ranks."""

    def step(self, batch: Batch, plan: Plan, keep_logits: bool = False) -> StepResult:
        """Run one batch under one plan; with whole rows of logits if ``keep_logits``."""
        ...

    def step_op_by_op(self, batch: Batch, plan: Plan) -> StepResult:
        """As :meth:`step` with logits, but no capture has a part in it."""
        ...

    def warm_up(self, batch: Batch, plan: Plan) -> bool:
        """Run a decode step of dummy rows; whether more warm-up steps are of use."""
        ...

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Bind plans that steps will need."""
        ...

    def instrument(self, make: Callable[[Worker], Wrap | Reader] | None, name: str = "") -> bool:
        """Read every step from now on, wrap it, or neither; returns whether plans are bound again."""
        ...

    def readings(self, name: str = "") -> Any:
        """An instrument's readings since the last call."""
        ...
