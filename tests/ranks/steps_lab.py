"""Instruments for steps of an engine on ranks that are processes: those import this file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from narrows.engine.program import Repeated
from narrows.engine.scratch import Scratch


class StepsSeen:
    """An instrument: how many bound steps were made by Python, and how many by a tape, on one rank."""

    def __init__(self, worker: Any) -> None:
        self.made = self.repeated = 0

    def readings(self) -> tuple[int, int]:
        seen = self.made, self.repeated
        self.made = self.repeated = 0
        return seen

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> SeenStep:
        return SeenStep(self, operation)


class SeenStep(Repeated):
    """One bound step of :class:`StepsSeen`."""

    def __init__(self, seen: StepsSeen, operation: Callable[..., None]) -> None:
        self.seen, self.operation = seen, operation

    def __call__(self, registers: Any, frame: Any) -> None:
        self.seen.made += 1
        self.operation(registers, frame)

    def repeated(self, registers: Any, frame: Any) -> Callable[[float], None]:
        def repeat(seconds: float) -> None:
            assert seconds >= 0
            self.seen.repeated += 1

        return repeat


class NoTapes:
    """An instrument around every step that a tape would miss, so that none is made."""

    def __init__(self, worker: Any) -> None:
        pass

    def readings(self) -> None:
        return None

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> Any:
        return lambda registers, frame: operation(registers, frame)


class Imported:
    """An instrument around no step: the modules of its rank's process."""

    def __init__(self, worker: Any) -> None:
        pass

    def readings(self) -> frozenset[str]:
        return frozenset(sys.modules)

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> Any:
        return operation


class LittleRoomOnRank1:
    """An instrument around no step: on rank 1 no walk fits into what tapes have for what they allocate."""

    def __init__(self, worker: Any) -> None:
        if worker.place.rank == 1:
            worker._tapes._scratch = Scratch(64)

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> Any:
        return operation
