"""One rank of the engine: its model, its bound plans, and the execution of one batch.

The previous step's samples stay here, so that a
token of the next batch may be a reference to one of them.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from narrows.arch.config import ModelConfig
from narrows.arch.stages import Field
from narrows.comm.communicator import Communicator
from narrows.comm.device import graphs_of
from narrows.engine.capture import CapturedSteps, Ran, Span
from narrows.engine.graphs import Graph, Graphs, Started
from narrows.engine.padding import Padded
from narrows.engine.program import Operation, Program, Wrap, bind
from narrows.engine.sampler import RowSampler, Sampler
from narrows.engine.step_record import Reader, StepRecord, StepRecorder, Wants
from narrows.layout import RowSplit, scattered
from narrows.models.decoder import Decoder, RankContext
from narrows.models.registry import build_model
from narrows.ops.paged import PagedRows, build_paged_rows, stage_paged_rows
from narrows.ops.rope_angles import Lengths
from narrows.ops.step_block import StepBlock
from narrows.plan.plan import Op, Plan
from narrows.sched.batch import Batch, sample_slot
from narrows.sched.sampling import Logprobs, TokenScore
from narrows.weights.source import WeightSource

__all__ = ["Instrument", "RowContext", "StepResult", "StepRun", "Worker", "logit_split"]


GRAPHS = "NARROWS_GRAPHS"
"""Environment variable: 1 captures decode steps of one rank as CUDA graphs (docs/gpu.md)."""


@runtime_checkable
class Instrument(Protocol):
    """An instrument: reads or wraps steps, and has readings."""

    def readings(self) -> Any:
        """The readings since the last call; resets them. Can be pickled."""
        ...


class RowContext(NamedTuple):
    """The inputs of one decode row: its position, the cache slot it writes, the tokens that it reads."""

    position: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """How one rank ran a step: replayed from a capture or not, the collectives by name, how many it came to, and the
    contexts of the decode rows of its group as they lay in memory."""

    replayed: bool
    collectives: tuple[str, ...]
    num_collectives: int
    contexts: tuple[RowContext, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One token per logit row, and the rows' logits if requested ([rows, vocab_size], else None).

    ``logprobs`` by logit row, for the rows whose request wants them, and ``scores`` for those that have a target; on
    rank 0 only, since all ranks have the same. ``run`` comes with the logits.
    """

    ids: tuple[int, ...]
    logits: Tensor | None = None
    run: StepRun | None = None
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    scores: dict[int, TokenScore] = field(default_factory=dict)


def logit_split(rows: RowSplit, logit_rows: tuple[int, ...]) -> RowSplit:
    """The split of the rows that ask for logits: each rank keeps those among its own scattered rows."""
    counts = []
    for rank in range(rows.mesh.size):
        start, stop = rows.span(scattered(rows.mesh), rank)
        counts.append(bisect_left(logit_rows, stop) - bisect_left(logit_rows, start))
    return RowSplit(rows.mesh, tuple(counts))


class Worker:
    """Runs the steps of one rank.

    Args:
        fields: the fields of the chain that plans are made from.
        page_size: tokens per page of the KV cache.
        wrap: put around every bound op (verification, faults); None for none.
        validate: check every plan before it is bound; only a test that plants a fault switches that off.
    """

    def __init__(
        self,
        comm: Communicator,
        config: ModelConfig,
        source: WeightSource,
        rank_context: RankContext,
        fields: dict[str, Field],
        *,
        page_size: int,
        wrap: Callable[[Worker], Wrap] | None = None,
        validate: bool = True,
    ) -> None:
        self._validate = validate
        self.comm, self.rank_context, self.fields, self.page_size = comm, rank_context, fields, page_size
        self.model: Decoder = build_model(config, source, rank_context)
        self._wraps: dict[str, Wrap] = {"": wrap(self)} if wrap else {}
        self._recorder = StepRecorder(rank_context.device)
        self._programs: dict[tuple[object, ...], Program] = {}
        self._signatures: dict[int, tuple[Plan, Program]] = {}
        self._samples = torch.zeros(0, dtype=torch.int64, device=rank_context.device)
        self._sampled: tuple[int, ...] = ()
        self._live: tuple[int, ...] | None = None  # which of the samples are of requests; None: all
        self._sampler = Sampler(config.vocab_size, rank_context.device)
        self._captured = CapturedSteps(comm, self.model, page_size, logit_split)
        self._graphs = Graphs(self._new_graph(), rank_context.device, self.stage)

    def _new_graph(self) -> Callable[[], Graph] | None:
        """What makes this rank's graphs. They are for one rank, and off until asked for: none has run on a card yet."""
        alone = self.rank_context.mesh.size == 1 and not self.rank_context.batch_invariant
        return graphs_of(self.rank_context.device) if alone and os.environ.get(GRAPHS) == "1" else None

    def step(self, batch: Batch, plan: Plan, keep_logits: bool = False) -> StepResult:
        """Run one batch under one plan. Every rank returns the same ids.

        Before the plan runs the host copies numbers to the device, meanwhile neither waits for the other, and after it
        the host reads the result.
        """
        return self._step(batch, plan, keep_logits=keep_logits, op_by_op=False)

    def step_op_by_op(self, batch: Batch, plan: Plan) -> StepResult:
        """As :meth:`step` with logits, but no capture has a part in it."""
        return self._step(batch, plan, keep_logits=True, op_by_op=True)

    def _step(self, batch: Batch, plan: Plan, *, keep_logits: bool, op_by_op: bool) -> StepResult:
        program = self._program(plan)
        came = self.comm.num_collectives if keep_logits else 0
        least = Wants.COLLECTIVES if keep_logits else Wants.NOTHING
        record = self._recorder.begin(program.ops, batch.phase, least)
        ran = None
        if not op_by_op:
            ran = self._run_captured(program, batch, record) or self._run_graph(program, batch, record)
        ran = ran or self._run(program, batch, record)
        if record is not None:
            self._recorder.end(record)
        self._samples = ran.registers[program.outputs["next_ids"]].flatten()
        self._live = ran.live
        if not keep_logits:
            return self._read(ran)
        logits = ran.registers[program.outputs["logits"]].clone()  # a capture writes there again
        assert ran.rows is not None and ran.live is None, "steps whose logits are kept are walked as they are"
        run = StepRun(
            replayed=ran.replayed,
            collectives=record.collectives() if record is not None else (),
            num_collectives=self.comm.num_collectives - came,
            contexts=_contexts(ran.rows),
        )
        return replace(self._read(ran), logits=logits, run=run)

    def warm_up(self, batch: Batch, plan: Plan) -> bool:
        """Run a decode step of dummy rows in the null page, so that the first real step like it finds its capture.

        Returns:
            whether more warm-up steps are of use: False if no step can be captured, or there is no room for another.
        """
        program = self._program(plan)
        captured = self._run_captured(program, batch, None, warm_up=True) or self._run_graph(program, batch, None)
        if captured is None:
            self._run(program, batch, None)  # other ranks may have a capture, and wait for this one
        return self._graphs.possible or (self._captured.possible and not self._captured.full)

    def _rows_of(self, batch: Batch) -> tuple[RowSplit, list[Span]]:
        """How the batch's rows are split over ranks, and (start, rows, pages) of every chunk of this rank's group."""
        rows = RowSplit.from_groups(self.rank_context.mesh, batch.group_rows)
        group = batch.groups[self.rank_context.mesh.group_of(self.rank_context.rank)]
        return rows, [(chunk.start, len(chunk.tokens), chunk.pages) for chunk in group]

    def _stage_lengths(self, batch: Batch, block: StepBlock) -> Lengths | None:
        """Tokens of the sequence that each of this group's rows belongs to, where the model's angles depend on it."""
        if not self.model.angles.by_length:
            return None
        group = batch.groups[self.rank_context.mesh.group_of(self.rank_context.rank)]
        return self.model.angles.stage([length for chunk in group for length in chunk.lengths()], block)

    def _run_captured(
        self, program: Program, batch: Batch, record: StepRecord | None, *, warm_up: bool = False
    ) -> Ran | None:
        """Replay a captured step, or capture it now; None if it cannot be captured."""
        rows, spans = self._rows_of(batch)
        block = StepBlock(self.rank_context.device)
        return self._captured.run(
            program,
            batch,
            rows,
            self._tokens,
            spans,
            partial(self._begin, batch, block),
            lengths=self._stage_lengths(batch, block),
            warm_up=warm_up,
            record=record,
        )

    def _begin(self, batch: Batch, block: StepBlock, ids_T: Tensor) -> RowSampler | None:
        """The sampler of a step whose ids are known."""
        sampler, see = self._sampler.stage(batch, block)
        see(ids_T)
        return sampler

    def _run(self, program: Program, batch: Batch, record: StepRecord | None, padding: Padded | None = None) -> Ran:
        """Run ``program`` op by op. ``padding``: what has padded the batch, if it is."""
        block = StepBlock(self.rank_context.device)
        sampler, start = self.stage(program, batch, block, padding=padding)
        block.send()
        started = start()
        registers = program.run(started.frame, started.ids_T.unsqueeze(-1), record)  # a column: ids move as fields do
        live = None if padding is None else padding.live
        return Ran(registers, sampler, started.frame.inputs.rows, replayed=False, live=live)

    def _run_graph(self, program: Program, batch: Batch, record: StepRecord | None) -> Ran | None:
        """Replay the graph of a step, or capture it now; None if it has to run without one."""
        if record is not None:  # times of ops are those of a walk
            return None
        ran = self._graphs.run(program, batch, lambda padded: self._rows_of(padded)[0], self._samples)
        if ran is None:
            return None
        return Ran(ran.registers, ran.sampler, None, replayed=ran.replayed, live=ran.padding.live)

    def stage(
        self,
        program: Program,
        batch: Batch,
        block: StepBlock,
        *,
        padding: Padded | None = None,
        samples: Tensor | None = None,
    ) -> tuple[RowSampler | None, Callable[[], Started]]:
        """Puts a step's numbers into ``block``.

        ``samples``: memory that the previous step's samples are read from, if not where they are.

        Returns:
            the step's sampler, and what makes its other inputs of the block once that is sent.
        """
        rows, spans = self._rows_of(batch)
        logit_rows = batch.logit_rows()
        ids, paged_rows = self._stage_ids(batch, block, samples), self._stage_rows(spans, block)
        sampler, see = self._sampler.stage(batch, block)
        lengths = self._stage_lengths(batch, block)
        selections = program.stage_selections(rows, logit_rows, block)
        dead = None if padding is None else block.put(padding.is_dead(), np.bool_)

        def start() -> Started:
            ids_T = ids()
            see(ids_T)
            inputs = self.model.begin_step(paged_rows(), sampler, lengths=lengths)
            dead_T = None if dead is None else dead.tensor
            frame = program.frame(inputs, rows, logit_split(rows, logit_rows), logit_rows, selections, dead_T)
            return Started(ids_T, frame, sampler)

        return sampler, start

    def instrument(self, make: Callable[[Worker], Wrap | Reader] | None, name: str = "") -> bool:
        """Begin or stop reading or wrapping steps (see :meth:`Engine.instrument`).

        Returns:
            whether plans are bound again, so that no capture is left: not for a reader.
        """
        was_around = self._wraps.pop(name, None) is not None
        self._recorder.readers.pop(name, None)
        made = make(self) if make is not None else None
        if isinstance(made, Reader):
            self._recorder.readers[name] = made
        elif made is not None:
            self._wraps[name] = made
        if not was_around and name not in self._wraps:
            return False
        self._captured.forget()
        self._graphs.forget()
        self._programs.clear()
        self._signatures.clear()
        return True

    def readings(self, name: str = "") -> Any:
        """An instrument's readings since the last call."""
        instrument = self._recorder.readers.get(name) or self._wraps.get(name)
        assert isinstance(instrument, Instrument), "no such instrument is around the steps"
        return instrument.readings()

    def caches(self) -> list[Tensor]:
        """The tensors of the KV cache, all layers' [slots, ...]."""
        return [
            held
            for layer in self.model.layers
            for name, held in vars(layer).items()
            if "cache" in name and isinstance(held, Tensor)
        ]

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Bind plans that steps will need, so that the first of those steps need not."""
        for plan in plans:
            self._program(plan)

    def _read(self, ran: Ran) -> StepResult:
        """The step's results as numbers: here, and only here, the host waits for the device."""
        ids = self._sampled = self._of_live(self._samples.tolist(), ran.live)
        if ran.sampler is None or self.rank_context.rank != 0:
            return StepResult(ids=ids)
        logprobs = ran.sampler.logprobs()
        if ran.live is not None:
            logprobs = {slot: logprobs[row] for slot, row in enumerate(ran.live) if row in logprobs}
        return StepResult(ids=ids, logprobs=logprobs, scores=ran.sampler.scores())

    @staticmethod
    def _of_live(ids: list[int], live: tuple[int, ...] | None) -> tuple[int, ...]:
        """The samples of rows that are requests'."""
        return tuple(ids) if live is None else tuple(ids[row] for row in live)

    def _stage_rows(self, spans: list[Span], block: StepBlock) -> Callable[[], PagedRows]:
        # Batch-invariant: every decode row is read by itself, so that no other's length pads it.
        alone = {"decode_group_slots": 1} if self.rank_context.batch_invariant else {}
        if block.is_remote:
            return stage_paged_rows(spans, self.page_size, block, self.rank_context.dtype, **alone)
        rows = build_paged_rows(spans, self.page_size, **alone)
        return lambda: rows

    def _program(self, plan: Plan) -> Program:
        """The bound plan; plans that run the same ops share one, since row counts come with each batch."""
        held = self._signatures.get(id(plan))
        if held is not None and held[0] is plan:
            return held[1]
        signature = plan.signature()
        program = self._programs.get(signature)
        if program is None:
            program = bind(
                plan,
                self.model,
                self.comm,
                self.fields,
                checked=self.comm.checked,
                validate=self._validate,
                wrap=self._around(),
            )
            self._programs[signature] = program
        self._signatures[id(plan)] = (plan, program)
        return program

    def _around(self) -> Wrap | None:
        """All that is put around steps as one, the first innermost."""
        if not self._wraps:
            return None
        wraps = tuple(self._wraps.values())

        def around(
            layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            for wrap in wraps:
                operation = wrap(layer, op, reads, writes, operation)
            return operation

        return around

    def _stage_ids(self, batch: Batch, block: StepBlock, samples: Tensor | None) -> Callable[[], Tensor]:
        """The token ids of all rows, references to the previous step's samples filled in on the device."""
        tokens = [token for group in batch.groups for chunk in group for token in chunk.tokens]
        ids = block.put(tokens)
        if samples is None:
            if min(tokens, default=0) >= 0:
                return lambda: ids.tensor
            samples = self._samples
        source_X, num = samples, samples.shape[0]
        at = block.put([num + row if token >= 0 else self._sample_row(token) for row, token in enumerate(tokens)])
        return lambda: torch.cat((source_X, ids.tensor)).index_select(0, at.tensor)

    def _sample_row(self, token: int) -> int:
        """Where among the samples that of a reference is: dead rows have some too."""
        slot = sample_slot(token)
        return slot if self._live is None else self._live[slot]

    def _tokens(self, batch: Batch) -> list[int]:
        """The same as plain numbers, from what was read of the previous step's samples."""
        tokens = (token for group in batch.groups for chunk in group for token in chunk.tokens)
        return [token if token >= 0 else self._sampled[sample_slot(token)] for token in tokens]


def _contexts(rows: PagedRows) -> tuple[RowContext, ...]:
    """The inputs of a step's decode rows."""
    numbers = (rows.positions_T[rows.decode_rows_B], rows.slots_T[rows.decode_rows_B], rows.decode_lens_B)
    return tuple(RowContext(*row) for row in zip(*(x.tolist() for x in numbers), strict=True))
