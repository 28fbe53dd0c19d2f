"""Decode steps walked once and recorded, then repeated by one compiled call: the CPU's counterpart of a CUDA graph.

Knows bound programs, the memory of a step's inputs, and torch's operations as far as to see that there are none; not
what the compiled calls compute. A walk is recorded when a program meets row counts for the first time. What
changes from step to step (ids, positions, slots, lengths, angles) lies in memory that stays; what walks allocate lies
in one `scratch.py` of all tapes. If an operation computes with torch, the tape ends before it, and the walk goes on
from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.comm.captured import CapturedCollectives
from narrows.comm.communicator import Communicator
from narrows.engine.program import Frame, Program, Registers
from narrows.engine.sampler import RowSampler
from narrows.engine.scratch import Scratch
from narrows.engine.step_record import OpCalls, StepRecord, Wants
from narrows.layout import RowSplit
from narrows.models.parts import Decoder
from narrows.native import Tape, library
from narrows.ops.compiled import gemm_library
from narrows.ops.paged import DecodeRows, PagedRows
from narrows.sched.batch import Batch

__all__ = ["Tapes", "uncaptured"]

_SCRATCH_BYTES = 64 << 20
"""What all tapes share for what they allocate; a walk that needs more is not recorded."""
_MOST_BYTES = 64 << 20
"""What all tapes may hold of the memory that ranks share. The oldest go first."""
_MOST_TAPES = 512
"""What is around their calls (arguments, registers, angles) takes some memory too."""
_LEAST_ROWS = 16
"""Rows that the first memory for contexts has room for."""
_MOST_UNFIT = 1 << 12
"""Kinds of steps that are known to be walked, never recorded."""

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
"""A program, the rows of each rank, the rows that ask for logits, and whether there is a sampler for them."""
Split = Callable[[RowSplit, tuple[int, ...]], RowSplit]
Lengths = Sequence[int] | None
"""Tokens of the sequence that each row of this rank's group belongs to, where angles depend on it."""
Begin = Callable[[Tensor], RowSampler | None]


class Ran(NamedTuple):
    """A step as it ran: the registers after it, what has sampled, the contexts that its rows were told, and whether it
    was replayed from a capture."""

    registers: Registers
    sampler: RowSampler | None
    rows: PagedRows
    replayed: bool


def uncaptured(dtype: torch.dtype, device: str) -> str:
    """Why no decode step of ranks on ``device`` can be captured, in a few words; empty if one can."""
    if device != "cpu":
        return f"ranks on {device} capture no steps"
    if dtype != torch.bfloat16:
        return f"no compiled code for {str(dtype).removeprefix('torch.')} here"
    return "" if library() is not None and gemm_library() is not None else "no compiled code here"


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of torch. Views, and memory as it comes, are no work to be done again; memory comes from
    ``scratch``, while there is room."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed, self.fits = False, True
        self._scratch = scratch
        scratch.begin()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook: what it would wrap around the next method imports its compiler, for more than a second in
        the middle of a step."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _FRESH:
            self.computed |= not func.is_view
            return out
        taken = self._scratch.take(out)
        self.fits &= taken is not None
        return out if taken is None else taken


class _Inputs:
    """The memory of what changes from step to step."""

    def __init__(
        self, model: Decoder, num_rows: int, spans: Sequence[Span], rows: DecodeRows, lengths: Lengths
    ) -> None:
        self._model, self._rows = model, rows
        self.ids_T = torch.zeros(num_rows, dtype=torch.int64)
        self._ids = self.ids_T.numpy()
        self.step = model.begin_step(self._rows.set(spans), lengths=lengths)

    def set(self, tokens: Sequence[int], spans: Sequence[Span], begin: Begin, lengths: Lengths) -> RowSampler | None:
        self._ids[:] = tokens
        sampler = begin(self.ids_T)
        self.step = self._model.begin_step(self._rows.set(spans), sampler, lengths=lengths, into=self.step)
        return sampler


class _Walk:
    """A walk that was recorded, up to the first operation that computes with torch."""

    def __init__(self, program: Program, frame: Frame, inputs: _Inputs) -> None:
        self.program, self.frame, self.inputs = program, frame, inputs
        self.fits = False
        self._stop = 0
        self._calls, self._collectives = OpCalls(), OpCalls()
        self._registers: Registers = []

    def record(self, comm: Communicator, scratch: Scratch, record: StepRecord) -> Registers | None:
        """Walk all operations. None: the communicator cannot repeat its collectives, and nothing was done.

        ``record`` gets every operation's times, and from there the walk has what each leaves whenever it is repeated.
        """
        self._tape = tape = Tape()
        recording, count = comm.capture_begin(tape), 0
        if recording is None:
            tape.end(0)
            return None
        self.recording: CapturedCollectives = recording
        try:
            with _Watcher(scratch) as watcher:
                registers = self.program.registers(self.inputs.ids_T.unsqueeze(-1))
                for number, operation in enumerate(self.program.operations):
                    if not watcher.computed:
                        self._registers, self._stop, count = list(registers), number, tape.size
                    record.run(number, operation, registers, self.frame)
                    watcher.computed |= tape.size < count  # a compiled call that no tape repeats
                    if not watcher.computed:
                        self._calls.add_last(record, count, tape.size)
                        if record.ops[number].crossed:
                            self._collectives.add_last(record, count, tape.size)
                if not watcher.computed:
                    self._registers, self._stop, count = list(registers), number + 1, tape.size
        finally:
            tape.end(count)
            comm.capture_end(count)
        self.fits = watcher.fits
        return registers

    @property
    def is_worth_it(self) -> bool:
        """Whether a good part of the walk is on the tape."""
        return self._stop > len(self.program.operations) // 2

    def repeat(self, comm: Communicator, record: StepRecord | None) -> Registers:
        comm.replay(self.recording)
        if record is not None:
            calls = self._calls if record.wants is Wants.EVERY_OP else self._collectives
            record.replayed(len(self._calls.numbers), calls, self._tape.times_ns)
        registers = list(self._registers)
        self.program.run_from(self._stop, registers, self.frame, record)
        return registers


class Tapes:
    """The recorded walks of one rank. Ranks need not agree: to repeat a walk is to make the same exchanges.

    ``possible``: whether any step can be on tape here, as far as is known. ``full``: a rehearsed walk found no room.
    """

    def __init__(self, comm: Communicator, model: Decoder, page_size: int, logit_split: Split) -> None:
        self._comm, self._model, self._page_size = comm, model, page_size
        self._logit_split = logit_split
        self._scratch = Scratch(_SCRATCH_BYTES)
        self._rows: DecodeRows | None = None
        self._walks: dict[Key, _Walk] = {}
        self._unfit: set[Key] = set()
        place = model.place
        self.full = False
        self.possible = library() is not None and place.device.type == "cpu" and place.dtype == torch.bfloat16

    def forget(self) -> None:
        """Drop all: their programs are bound anew."""
        for walk in self._walks.values():
            walk.recording.close()
        self._walks.clear()
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
        lengths: Lengths = None,
        rehearsed: bool = False,
        record: StepRecord | None = None,
    ) -> Ran | None:
        """A decode step, replayed or walked and recorded; None if it is to be walked without a tape.

        ``tokens_of`` gives the batch's ids, ``begin`` makes the step's sampler from them. ``lengths``: as
        :meth:`Decoder.begin_step` takes them. ``rehearsed``: the rows are nobody's. ``record``: keep times there.
        """
        if not self.possible or not program.repeatable or batch.phase != "decode":
            return None
        key = program, rows, batch.logit_rows(), batch.needs_logits
        walk = self._walks.pop(key, None)
        if walk is None:
            if key in self._unfit:
                return None
            return self._record(key, tokens_of(batch), spans, begin, lengths, rehearsed, record)
        self._walks[key] = walk  # it is the newest now
        sampler = walk.inputs.set(tokens_of(batch), spans, begin, lengths)
        walk.frame.inputs = walk.inputs.step
        return Ran(walk.repeat(self._comm, record), sampler, walk.inputs.step.rows, replayed=True)

    def _record(
        self,
        key: Key,
        tokens: Sequence[int],
        spans: Sequence[Span],
        begin: Begin,
        lengths: Lengths,
        rehearsed: bool,
        record: StepRecord | None,
    ) -> Ran:
        program, rows, logit_rows, _ = key
        inputs = _Inputs(self._model, len(tokens), spans, self._rows_for(len(spans)), lengths)
        sampler = inputs.set(tokens, spans, begin, lengths)
        split = self._logit_split(rows, logit_rows)
        frame = program.frame(inputs.step, rows, split, logit_rows)
        walk = _Walk(program, frame, inputs)
        whole = record or StepRecord(program.ops, "decode", Wants.EVERY_OP, self._model.place.device)
        whole.wants = Wants.EVERY_OP
        registers = walk.record(self._comm, self._scratch, whole)
        if registers is None:
            self.possible = False  # and the sampler has been begun: the walk is made here all the same
            registers = program.run(frame, inputs.ids_T.unsqueeze(-1), record)
            return Ran(registers, sampler, inputs.step.rows, replayed=False)
        if walk.fits and walk.is_worth_it:
            self._keep(key, walk, rehearsed)
        else:
            walk.recording.close()
            if len(self._unfit) >= _MOST_UNFIT:
                self._unfit.clear()
            self._unfit.add(key)
        return Ran(registers, sampler, inputs.step.rows, replayed=False)

    def _keep(self, key: Key, walk: _Walk, rehearsed: bool) -> None:
        """Hold a walk, in place of the oldest ones if there is no room; one that was only rehearsed drives none out."""
        held = walk.recording.nbytes + sum(walk.recording.nbytes for walk in self._walks.values())
        if rehearsed and (held > _MOST_BYTES or len(self._walks) == _MOST_TAPES):
            walk.recording.close()
            self.full = True
            return
        self._walks[key] = walk
        while held > _MOST_BYTES or len(self._walks) > _MOST_TAPES:
            oldest = self._walks.pop(next(iter(self._walks)))
            held -= oldest.recording.nbytes
            oldest.recording.close()

    def _rows_for(self, num_rows: int) -> DecodeRows:
        """What the steps of all tapes write their rows' contexts to: a new one only if there are more rows than ever,
        which leaves the tapes that there are the old one."""
        if self._rows is None or self._rows.num_rows < num_rows:
            most = max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length())
            alone = {"group_slots": 1} if self._model.place.batch_invariant else {}
            self._rows = DecodeRows(most, self._model.place.num_positions, self._page_size, **alone)
        return self._rows
