"""How long each operation of every step took on a rank, in the order of the plan that was run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from narrows.engine.step_record import StepRecord, Wants

if TYPE_CHECKING:
    from narrows.engine.worker import Worker

__all__ = ["OpSeconds"]


class OpSeconds:
    """Seconds of every operation; a reader of :meth:`Engine.instrument`."""

    wants = Wants.EVERY_OP

    def __init__(self, worker: Worker) -> None:
        self._seconds: list[float] = []

    def readings(self) -> list[float]:
        """Seconds of every op of every run since the last call, in order."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def take(self, record: StepRecord) -> None:
        """Keep the seconds of one execution."""
        self._seconds += [end - start for start, end in zip(record.starts, record.ends, strict=True)]
