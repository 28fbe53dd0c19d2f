"""Instruments for steps of an engine on ranks that are processes: those import this file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from narrows.engine import capture
from narrows.engine.arena import Arena
from narrows.engine.step_record import StepRecord, Wants
from narrows.ops.paged import DecodeRows


class StepsSeen:
    """A reader: how many operations ran op by op, and how many were replayed, on one rank."""

    wants = Wants.EVERY_OP

    def __init__(self, worker: Any) -> None:
        self.made = self.replayed = 0

    def readings(self) -> tuple[int, int]:
        seen = self.made, self.replayed
        self.made = self.replayed = 0
        return seen

    def take(self, record: StepRecord) -> None:
        assert all(start <= end for start, end in zip(record.starts, record.ends, strict=True))
        assert record.numbers == list(range(len(record.ops)))
        self.made += len(record.ops) - record.num_replayed
        self.replayed += record.num_replayed


class NoCapture:
    """A wrap around every operation, so that no step is captured."""

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
    """An instrument around no step: on rank 1 no step fits into the arena."""

    def __init__(self, worker: Any) -> None:
        if worker.rank_context.rank == 1:
            worker._captured._arena = Arena(64)

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> Any:
        return operation


class _Planted:
    """An instrument around no step."""

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Callable[..., None]) -> Any:
        return operation


class StaleLengths(_Planted):
    """On rank 1 a replay reads as many tokens as the captured step, whatever the true length."""

    def __init__(self, worker: Any) -> None:
        if worker.rank_context.rank == 1:
            true_set = DecodeRows.set

            def set_all_but_lengths(self: DecodeRows, spans: Any) -> Any:
                rows = true_set(self, spans)
                rows.decode_lens_B.fill_(2)
                return rows

            DecodeRows.set = set_all_but_lengths  # type: ignore[method-assign]


class WrongSlots(_Planted):
    """On rank 1 a replay writes its first row one slot further than it should."""

    def __init__(self, worker: Any) -> None:
        if worker.rank_context.rank == 1:
            true_set = DecodeRows.set

            def set_next_slot(self: DecodeRows, spans: Any) -> Any:
                rows = true_set(self, spans)
                rows.slots_T[:1] += 1
                return rows

            DecodeRows.set = set_next_slot  # type: ignore[method-assign]


class LeftOutCollective(_Planted):
    """The capture of every rank ends before the last reduction, and a replay continues from there."""

    def __init__(self, worker: Any) -> None:
        for name in ("all_reduce", "all_reduce_norm"):
            setattr(worker.comm, name, _computing(getattr(worker.comm, name)))
        true_keep = capture.CapturedSteps._keep

        def keep(self: Any, key: Any, step: Any, warm_up: bool) -> None:
            step._stop += 1
            true_keep(self, key, step, warm_up)

        capture.CapturedSteps._keep = keep  # type: ignore[method-assign]


def _computing(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``collective``, with an addition by torch, which no capture holds, where it completes the last sum."""

    def made(x: Any, ranks: Any, counts: Any, label: str, *more: Any, **options: Any) -> Any:
        if "final_norm" in label:
            torch.zeros(1).add_(1)
        return collective(x, ranks, counts, label, *more, **options)

    return made
