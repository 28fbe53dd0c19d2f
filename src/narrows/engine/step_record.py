"""When each operation of a step ran, the rows and bytes it left, and the bytes that came from other ranks: recorded
once per step and handed to every reader, whether the step was run op by op or replayed from a capture.

Times are seconds of ``perf_counter``; on Linux that is CLOCK_MONOTONIC, the clock of captures too. A collective's time
holds the wait for the slowest rank. Where a reader wants every operation, a GPU is waited for after each, so that its
time is its own. A replay has the times of its calls; its rows and bytes are those of the step that was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from time import perf_counter
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from narrows.comm.device import synchronize
from narrows.layout import Encoding, Move, MoveKind
from narrows.plan.plan import Op

__all__ = ["BoundOp", "OpCalls", "Reader", "StepRecord", "StepRecorder", "Wants"]


class Wants(IntEnum):
    """Which operations a reader wants recorded."""

    NOTHING = 0
    COLLECTIVES = 1
    EVERY_OP = 2


class BoundOp(NamedTuple):
    """One operation of a bound plan, and the registers that it writes. ``crossed`` and ``came``: those of the fields
    that cross ranks, before and after, and ``encodings`` how each travels; empty where nothing crosses."""

    layer: int | None
    op: Op
    writes: tuple[int, ...]
    crossed: tuple[int, ...]
    came: tuple[int, ...]
    encodings: tuple[Encoding, ...]

    @classmethod
    def of(cls, layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...]) -> BoundOp:
        """``reads`` and ``writes``: its registers."""
        if op.move is None or op.move.kind is MoveKind.SLICE:
            return cls(layer, op, writes, (), (), ())
        num = len(writes) if op.stage is None else 1  # the residual of a reduction with its norm crosses no ranks
        return cls(layer, op, writes, reads[:num], writes[:num], op.encodings or (Encoding.PLAIN,) * num)

    def __str__(self) -> str:
        where = self.op.boundary if self.layer is None else f"layer {self.layer} {self.op.boundary}"
        return f"{self.op.name} before {where}"

    @property
    def move(self) -> Move | None:
        """The collective that it makes; None for a slice too."""
        return self.op.move if self.crossed else None


@dataclass(slots=True)
class OpCalls:
    """Operations of a capture, column by column: calls ``firsts[i]`` to ``stops[i] - 1`` make operation ``numbers[i]``,
    which leaves so much."""

    numbers: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def add_last(self, record: StepRecord, first: int, stop: int) -> None:
        """The operation that was recorded last has made calls ``first`` to ``stop - 1``."""
        self.numbers.append(record.numbers[-1])
        self.firsts.append(first)
        self.stops.append(stop)
        self.rows.append(record.rows[-1])
        self.nbytes.append(record.nbytes[-1])
        self.received.append(record.received[-1])


@dataclass(slots=True)
class StepRecord:
    """One step on one rank. For each recorded operation, in order: its number among ``ops``, when it began and ended,
    the rows and bytes it left, and the bytes that came from other ranks. The first ``num_replayed`` of the plan's
    operations were replayed."""

    ops: tuple[BoundOp, ...]
    phase: str
    wants: Wants
    device: torch.device
    num_replayed: int = 0
    numbers: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def run(self, number: int, operation: Callable[[list[Any], Any], None], registers: list[Any], frame: Any) -> None:
        """Run an operation, and record it if that is wanted."""
        op = self.ops[number]
        if self.wants is not Wants.EVERY_OP and not op.crossed:
            return operation(registers, frame)
        held = [registers[i].nbytes for i in op.crossed]
        start = perf_counter()
        operation(registers, frame)
        if self.wants is Wants.EVERY_OP:
            synchronize(self.device)
        end = perf_counter()
        came = 0
        if (move := op.move) is not None:
            fields = zip(held, op.came, op.encodings, strict=True)
            came = sum(_received(move, before, registers[i], encoding) for before, i, encoding in fields)
        nbytes = sum(registers[i].nbytes for i in op.writes)
        self.numbers.append(number)
        self.starts.append(start)
        self.ends.append(end)
        self.rows.append(registers[op.writes[0]].shape[0])
        self.nbytes.append(nbytes)
        self.received.append(came)

    def collectives(self) -> tuple[str, ...]:
        """The collectives that were recorded, by name."""
        return tuple(str(self.ops[number]) for number in self.numbers if self.ops[number].crossed)

    def replayed(self, num: int, calls: OpCalls, times_ns: Sequence[int]) -> None:
        """The plan's first ``num`` operations were replayed; ``calls``: those that are wanted. ``times_ns[i]``: when
        call i began, which is when call i - 1 ended."""
        self.num_replayed = num
        self.numbers += calls.numbers
        self.starts += [times_ns[i] * 1e-9 for i in calls.firsts]
        self.ends += [times_ns[i] * 1e-9 for i in calls.stops]
        self.rows += calls.rows
        self.nbytes += calls.nbytes
        self.received += calls.received


def _received(move: Move, held: int, left: Any, encoding: Encoding) -> int:
    """Bytes of one field that a rank gets from the others: it holds ``held`` bytes and has ``left`` afterwards."""
    others = move.num_ranks - 1
    if move.kind is MoveKind.REDUCE_SCATTER:
        return int(left.nbytes) * others
    if move.kind is MoveKind.ALL_REDUCE:  # a share of the sum from each, then each one's sum
        return 2 * int(left.nbytes) * others // move.num_ranks
    assert move.kind in (MoveKind.ALL_GATHER, MoveKind.COLUMN_GATHER), f"not known what {move.kind} sends"
    came = int(left.nbytes) - held
    if encoding is Encoding.PLAIN or not came:
        return came
    row_bytes = int(left.shape[-1] * left.element_size())
    return came // row_bytes * encoding.row_bytes(left.shape[-1], left.element_size())


@runtime_checkable
class Reader(Protocol):
    """Reduces the records of one rank's steps; an instrument of :meth:`Engine.instrument`."""

    @property
    def wants(self) -> Wants:
        """Called before each step."""
        ...

    def take(self, record: StepRecord) -> None:
        """A step has ended. More may be recorded than this reader wants."""
        ...

    def readings(self) -> Any:
        """The readings since the last call; resets them. Can be pickled."""
        ...


class StepRecorder:
    """Hands the records of one rank's steps to its readers, by name. Without a reader nothing is recorded."""

    def __init__(self, device: torch.device) -> None:
        self.readers: dict[str, Reader] = {}
        self._device = device

    def begin(self, ops: tuple[BoundOp, ...], phase: str, least: Wants = Wants.NOTHING) -> StepRecord | None:
        """The record of a step that begins now, of ``least`` or more; None if no reader wants one."""
        wants = max([least, *(reader.wants for reader in self.readers.values())])
        return StepRecord(ops, phase, wants, self._device) if wants else None

    def end(self, record: StepRecord) -> None:
        """The step has ended."""
        for reader in self.readers.values():
            reader.take(record)
