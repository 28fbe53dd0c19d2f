"""Decode steps captured once and then replayed by one compiled call: the CPU's counterpart of a CUDA graph.

A step is captured when a program first runs its row counts. What changes from step to step (ids, positions, slots,
lengths, angles) lies in memory that stays; everything else that a step allocates comes from one arena, which all
captured steps share. If an operation computes with torch, the capture ends before it, and a replay runs the rest op by
op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.comm.captured import CapturedCollectives
from narrows.comm.communicator import Communicator
from narrows.engine.arena import Arena
from narrows.engine.program import Frame, Program, Registers
from narrows.engine.sampler import RowSampler
from narrows.engine.step_record import OpCalls, StepRecord, Wants
from narrows.layout import RowSplit
from narrows.models.decoder import Decoder
from narrows.native import CapturedCalls
from narrows.ops.compiled import kernels
from narrows.ops.paged import DecodeRows, PagedRows
from narrows.ops.rope_angles import Lengths
from narrows.ops.step_block import StepBlock
from narrows.sched.batch import Batch

__all__ = ["CapturedSteps", "uncaptured"]

_ARENA_BYTES = 64 << 20
"""Size of the arena that captured steps share. A step that needs more is not captured."""
_MOST_BYTES = 64 << 20
"""Shared memory that captured steps may reserve. The oldest are evicted."""
_MOST_STEPS = 512
"""Captured steps that are kept: arguments, registers and angles of each take memory too."""
_LEAST_ROWS = 16
"""Rows that the first memory for contexts has room for."""
_MOST_UNFIT = 1 << 12
"""Keys that are remembered as not worth a capture."""

_aten = torch.ops.aten
_FRESH = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)

Span = tuple[int, int, tuple[int, ...]]
Key = tuple[Program, RowSplit, tuple[int, ...], bool]
"""A program, the rows of each rank, the rows with logits, and whether they have a sampler."""
Split = Callable[[RowSplit, tuple[int, ...]], RowSplit]
Begin = Callable[[Tensor], RowSampler | None]


class Ran(NamedTuple):
    """A step that has run: its registers, its sampler, the contexts of its rows, and whether it was replayed. ``live``:
    the rows that are requests', where others only pad."""

    registers: Registers
    sampler: RowSampler | None
    rows: PagedRows | None
    replayed: bool
    live: tuple[int, ...] | None = None


def uncaptured(dtype: torch.dtype, device: str) -> str:
    """Why no decode step of ranks on ``device`` can be captured, in a few words; empty if one can."""
    if device != "cpu":
        return f"ranks on {device} capture no steps"
    if dtype != torch.bfloat16:
        return f"no compiled code for {str(dtype).removeprefix('torch.')} here"
    return "" if kernels() is not None else "no compiled code here"


class _TorchWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches torch's operations during a capture: notes whether one computes, and allocates from ``arena`` while
    there is room. A view or an uninitialised tensor is no computation."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed, self.fits = False, True
        self._arena = arena
        arena.reset()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook would import its compiler, which takes more than a second in the middle of a step."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _FRESH:
            self.computed |= not func.is_view
            return out
        taken = self._arena.take(out)
        self.fits &= taken is not None
        return out if taken is None else taken


class _Inputs:
    """The memory of inputs that change from step to step."""

    def __init__(
        self, model: Decoder, num_rows: int, spans: Sequence[Span], rows: DecodeRows, lengths: Lengths | None
    ) -> None:
        self._model, self._rows = model, rows
        self.ids_T = torch.zeros(num_rows, dtype=torch.int64)
        self._ids = self.ids_T.numpy()
        self.step = model.begin_step(self._rows.set(spans), lengths=lengths)

    def set(
        self, tokens: Sequence[int], spans: Sequence[Span], begin: Begin, lengths: Lengths | None
    ) -> RowSampler | None:
        self._ids[:] = tokens
        sampler = begin(self.ids_T)
        self.step = self._model.begin_step(self._rows.set(spans), sampler, lengths=lengths, into=self.step)
        return sampler


class CapturedStep:
    """A captured step, up to its first operation that computes with torch."""

    def __init__(self, program: Program, frame: Frame, inputs: _Inputs) -> None:
        self.program, self.frame, self.inputs = program, frame, inputs
        self.fits = False
        self._stop = 0
        self._all_ops, self._collective_ops = OpCalls(), OpCalls()
        self._registers: Registers = []

    def capture(self, comm: Communicator, arena: Arena, record: StepRecord) -> Registers | None:
        """Run all operations and capture their calls. None: ``comm`` cannot replay its collectives; nothing has run.

        ``record`` gets every operation's times, and keeps what each operation reports at a replay.
        """
        self._calls = calls = CapturedCalls()
        collectives, count = comm.capture_begin(calls), 0
        if collectives is None:
            calls.end(0)
            return None
        self.collectives: CapturedCollectives = collectives
        try:
            with _TorchWatch(arena) as watch:
                registers = self.program.registers(self.inputs.ids_T.unsqueeze(-1))
                for number, operation in enumerate(self.program.operations):
                    if not watch.computed:
                        self._registers, self._stop, count = list(registers), number, calls.size
                    record.run(number, operation, registers, self.frame)
                    watch.computed |= calls.size < count  # a compiled call that cannot be replayed
                    if not watch.computed:
                        self._all_ops.add_last(record, count, calls.size)
                        if record.ops[number].crossed:
                            self._collective_ops.add_last(record, count, calls.size)
                if not watch.computed:
                    self._registers, self._stop, count = list(registers), number + 1, calls.size
        finally:
            calls.end(count)
            comm.capture_end(count)
        self.fits = watch.fits
        return registers

    @property
    def is_worth_it(self) -> bool:
        """Whether more than half of the operations are captured."""
        return self._stop > len(self.program.operations) // 2

    def replay(self, comm: Communicator, record: StepRecord | None) -> Registers:
        """Replay the captured calls, then run the remaining operations; the registers after them."""
        comm.replay(self.collectives)
        if record is not None:
            ops = self._all_ops if record.wants is Wants.EVERY_OP else self._collective_ops
            record.replayed(len(self._all_ops.numbers), ops, self._calls.times_ns)
        registers = list(self._registers)
        self.program.run_from(self._stop, registers, self.frame, record)
        return registers


class CapturedSteps:
    """The captured steps of one rank. Ranks need not have the same: a replay makes the same exchanges as a run.

    ``possible``: whether any step can be captured here, as far as is known. ``full``: a warm-up step found no room.
    """

    def __init__(self, comm: Communicator, model: Decoder, page_size: int, logit_split: Split) -> None:
        self._comm, self._model, self._page_size = comm, model, page_size
        self._logit_split = logit_split
        self._arena = Arena(_ARENA_BYTES)
        self._rows: DecodeRows | None = None
        self._steps: dict[Key, CapturedStep] = {}
        self._unfit: set[Key] = set()
        rank_context = model.rank_context
        self.full = False
        self.possible = (
            kernels() is not None and rank_context.device.type == "cpu" and rank_context.dtype == torch.bfloat16
        )

    def forget(self) -> None:
        """Drop all captures: their programs are bound again."""
        for step in self._steps.values():
            step.collectives.close()
        self._steps.clear()
        self._unfit.clear()
        self.full = False

    def run(
        self,
        program: Program,
        batch: Batch,
        rows: RowSplit,
        tokens_of: Callable[[Batch], list[int]],
        spans: Sequence[Span],
        begin: Begin,
        *,
        lengths: Lengths | None = None,
        warm_up: bool = False,
        record: StepRecord | None = None,
    ) -> Ran | None:
        """Replay a decode step, or run and capture it; None if it has to run without a capture.

        ``tokens_of`` gives the batch's ids, ``begin`` makes the step's sampler from them. ``lengths``: as
        :meth:`Decoder.begin_step` takes them. ``warm_up``: the rows are dummies. ``record``: keep times there.
        """
        if not self.possible or not program.capturable or batch.phase != "decode":
            return None
        key = program, rows, batch.logit_rows(), batch.needs_logits
        step = self._steps.pop(key, None)
        if step is None:
            if key in self._unfit:
                return None
            return self._capture(key, tokens_of(batch), spans, begin, lengths, warm_up, record)
        self._steps[key] = step  # now the newest
        sampler = step.inputs.set(tokens_of(batch), spans, begin, lengths)
        step.frame.inputs = step.inputs.step
        return Ran(step.replay(self._comm, record), sampler, step.inputs.step.rows, replayed=True)

    def _capture(
        self,
        key: Key,
        tokens: Sequence[int],
        spans: Sequence[Span],
        begin: Begin,
        lengths: Lengths | None,
        warm_up: bool,
        record: StepRecord | None,
    ) -> Ran:
        program, rows, logit_rows, _ = key
        inputs = _Inputs(self._model, len(tokens), spans, self._rows_for(len(spans)), lengths)
        sampler = inputs.set(tokens, spans, begin, lengths)
        split = self._logit_split(rows, logit_rows)
        selections = program.stage_selections(rows, logit_rows, StepBlock(self._model.rank_context.device))
        frame = program.frame(inputs.step, rows, split, logit_rows, selections)
        step = CapturedStep(program, frame, inputs)
        whole = record or StepRecord(program.ops, "decode", Wants.EVERY_OP, self._model.rank_context.device)
        whole.wants = Wants.EVERY_OP
        registers = step.capture(self._comm, self._arena, whole)
        if registers is None:
            self.possible = False  # the sampler has begun, so the step has to run here
            registers = program.run(frame, inputs.ids_T.unsqueeze(-1), record)
            return Ran(registers, sampler, inputs.step.rows, replayed=False)
        if step.fits and step.is_worth_it:
            self._keep(key, step, warm_up)
        else:
            step.collectives.close()
            if len(self._unfit) >= _MOST_UNFIT:
                self._unfit.clear()
            self._unfit.add(key)
        return Ran(registers, sampler, inputs.step.rows, replayed=False)

    def _keep(self, key: Key, step: CapturedStep, warm_up: bool) -> None:
        """Keep a captured step; it evicts the oldest, unless it comes from a warm-up."""
        held = step.collectives.nbytes + sum(other.collectives.nbytes for other in self._steps.values())
        if warm_up and (held > _MOST_BYTES or len(self._steps) == _MOST_STEPS):
            step.collectives.close()
            self.full = True
            return
        self._steps[key] = step
        while held > _MOST_BYTES or len(self._steps) > _MOST_STEPS:
            oldest = self._steps.pop(next(iter(self._steps)))
            held -= oldest.collectives.nbytes
            oldest.collectives.close()

    def _rows_for(self, num_rows: int) -> DecodeRows:
        """The memory for the contexts of captured rows: a new one only if there are more rows than ever before, and
        then earlier captures keep the old one."""
        if self._rows is None or self._rows.num_rows < num_rows:
            most = max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length())
            alone = {"group_slots": 1} if self._model.rank_context.batch_invariant else {}
            self._rows = DecodeRows(most, self._model.rank_context.num_positions, self._page_size, **alone)
        return self._rows
