"""Decode steps as device graphs: one per program, bucket of rows and padded pages, replayed with other numbers.

All numbers of a step come in one block of memory that stays (`StepBlock`). What is captured begins there, with page
tables, angles and the previous step's samples, and ends with the sampled ids, so a replay is one copy and one launch.
A step of a new key is walked, captured for the next time, and replayed once: a graph that gives other ids is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrows.engine.padding import Padded, padded
from narrows.engine.program import Frame, Program, Registers
from narrows.engine.sampler import RowSampler
from narrows.layout import RowSplit
from narrows.ops.step_block import Layout, StepBlock
from narrows.sched.batch import Batch, Chunk

__all__ = ["Graph", "GraphRan", "Graphs", "Started"]

MOST_SAMPLES = 4096
"""Samples of the previous step that a captured step has room for."""
MOST_GRAPHS = 256
"""Graphs that are kept. The oldest are dropped."""

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """Work of a device, captured once: `comm.device.DeviceGraph`."""

    def capture(self, walk: Callable[[], None]) -> None:
        """Captures what ``walk`` gives the device, without running it."""
        ...

    def replay(self) -> None:
        """Gives the device that work again."""
        ...


@dataclass(slots=True)
class Started:
    """A step that can run: its ids, its frame, its sampler."""

    ids_T: Tensor
    frame: Frame
    sampler: RowSampler | None


class Stage(Protocol):
    """Puts a step's numbers into a block (`Worker.stage`)."""

    def __call__(
        self, program: Program, batch: Batch, block: StepBlock, *, padding: Padded, samples: Tensor
    ) -> tuple[RowSampler | None, Callable[[], Started]]:
        """The step's sampler, and what makes its other inputs of the block once that is sent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRan:
    """A step that has run: its registers, its sampler, whether a graph ran, and the batch that it was padded to."""

    registers: Registers
    sampler: RowSampler | None
    replayed: bool
    padding: Padded


class _Step:
    """The walk of one key, in memory that stays; it keeps the registers and the sampler of its last walk."""

    def __init__(self, program: Program, memory: Tensor, start: Callable[[], Started]) -> None:
        self.memory = memory
        self._program, self._start = program, start
        self.registers: Registers = []
        self.sampler: RowSampler | None = None

    def walk(self) -> None:
        started = self._start()
        self.registers = self._program.run(started.frame, started.ids_T.unsqueeze(-1))
        self.sampler = started.sampler


class Graphs:
    """The graphs of one rank. ``new``: makes an empty one; None where the device, or the mesh, can have none.

    ``possible`` is whether any step can be captured, as far as is known.
    """

    def __init__(self, new: Callable[[], Graph] | None, device: torch.device, stage: Stage) -> None:
        self._new, self._stage, self._device = new, stage, device
        self.possible = new is not None
        self._graphs: dict[tuple[Program, RowSplit, bool, Layout], tuple[_Step, Graph]] = {}
        self._samples = torch.zeros(MOST_SAMPLES if self.possible else 0, dtype=torch.int64, device=device)

    def forget(self) -> None:
        """Drops all graphs: their programs are bound again."""
        self._graphs.clear()

    def run(
        self, program: Program, batch: Batch, rows_of: Callable[[Batch], RowSplit], last: Tensor
    ) -> GraphRan | None:
        """Replays a decode step, or walks and captures it; None if it has to run without a graph.

        ``last``: the previous step's samples.
        """
        if not self.possible or self._new is None or not program.capturable or not _fits(batch):
            return None
        if last.shape[0] > MOST_SAMPLES:
            return None
        padding = padded(batch)
        block = StepBlock(self._device, stays=True)
        sampler, start = self._stage(program, padding.batch, block, padding=padding, samples=self._samples)
        self._samples[: last.shape[0]].copy_(last)
        key = program, rows_of(padding.batch), batch.needs_logits, block.layout
        held = self._graphs.pop(key, None)
        if held is None:
            memory = block.send()
            step = _Step(program, memory, start)
            registers = self._capture(key, step, self._new(), program.outputs["next_ids"])
            return GraphRan(registers=registers, sampler=sampler, replayed=False, padding=padding)
        self._graphs[key] = held  # now the newest
        step, graph = held
        block.send(into=step.memory)
        graph.replay()
        if sampler is not None and step.sampler is not None:
            sampler.adopt(step.sampler)
        return GraphRan(registers=step.registers, sampler=sampler, replayed=True, padding=padding)

    def _capture(
        self, key: tuple[Program, RowSplit, bool, Layout], step: _Step, graph: Graph, next_ids: int
    ) -> Registers:
        """Walks, captures and replays; the registers of the walk. Both write the same rows of the cache."""
        step.walk()
        walked = step.registers
        try:
            graph.capture(step.walk)
            graph.replay()
            why = "" if torch.equal(step.registers[next_ids], walked[next_ids]) else "one gave other tokens than a walk"
        except RuntimeError as error:
            why = str(error)
        if why:
            _log.warning("decode steps run without graphs: %s", why)
            self.possible = False
            self.forget()
            step.walk()  # what the capture has left in registers and sampler is nothing
            return step.registers
        self._graphs[key] = step, graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        return walked


def _fits(batch: Batch) -> bool:
    """Whether the step is one that a graph can be of: decode rows that are all sampled, from their logits alone."""
    return batch.phase == "decode" and all(_is_plain(chunk) for group in batch.groups for chunk in group)


def _is_plain(chunk: Chunk) -> bool:
    params: Sequence[object] = ()
    if chunk.sampling is not None:
        params = chunk.sampling.penalizes, chunk.sampling.logit_bias
    return chunk.num_logits == 1 and not any((*params, chunk.targets, chunk.skipped, chunk.allowed, chunk.banned))
