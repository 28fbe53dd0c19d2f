"""One step of the engine made by hand: a batch of exactly the given rows, run without a scheduler."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from narrows.calibrate.wait_attribution import attribute_waits
from narrows.cost.environment import num_cores
from narrows.cost.pricer import StepShape
from narrows.engine.calls import RankWorker
from narrows.engine.config import EngineConfig
from narrows.engine.core import Engine
from narrows.engine.program import Operation
from narrows.engine.worker import Worker
from narrows.layout import split_evenly
from narrows.plan.plan import Op, Plan
from narrows.sched.batch import Batch, Chunk
from narrows.sched.pages import num_pages_for

__all__ = ["IN_FLIGHT", "StepWork", "attributed_op_times", "fill_caches", "run_steps", "step_title"]

_FILLED_AT_ONCE = 4096
IN_FLIGHT = 2
"""Steps handed over at once: the one that runs and the next, as the engine has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One step of ``rows`` rows. In ``decode`` each is a sequence of ``context`` tokens; in ``prefill`` they are whole
    prompts of ``context`` tokens (0: one per group)."""

    rows: int
    phase: str
    context: int
    seed: int = 0

    def limits(self, config: EngineConfig) -> EngineConfig:
        """``config`` with room for the step, whatever it says of limits."""
        rows = split_evenly(self.rows, max(config.dp, 1))[0]
        longest = self.length(rows) + 1
        held = len(self._spans(rows, self.length(rows))) * (longest + config.page_size)
        return replace(config, max_context=longest, kv_tokens=max(config.kv_tokens or 0, held), rows_per_step=self.rows)

    def length(self, group_rows: int) -> int:
        return self.context or max(group_rows, 1)

    def batch(self, num_groups: int, page_size: int, vocab_size: int) -> Batch:
        """The step by hand. What the cache holds before its rows is whatever is there: see :func:`fill_caches`."""
        draw = random.Random(self.seed)
        groups = []
        for number in split_evenly(self.rows, num_groups):
            length = self.length(number)
            pages_each = num_pages_for(length, page_size)
            spans = self._spans(number, length)
            groups.append(
                tuple(
                    Chunk(
                        request=at,
                        start=start,
                        tokens=tuple(draw.randrange(vocab_size) for _ in range(start, stop)),
                        pages=tuple(range(1 + at * pages_each, 1 + at * pages_each + num_pages_for(stop, page_size))),
                        num_logits=1,
                    )
                    for at, (start, stop) in enumerate(spans)
                )
            )
        return Batch(groups=tuple(groups))

    def batch_for(self, engine: Engine) -> Batch:
        """The step by hand for ``engine``, which has room for it (:meth:`limits`)."""
        resolved = engine.resolved
        batch = self.batch(resolved.mesh.num_groups, resolved.limits.page_size, resolved.config.vocab_size)
        last, held = max(max(chunk.pages) for chunk in chain(*batch.groups)), resolved.limits.pages_per_group
        assert last < held, f"{step_title(self)} needs {last + 1} pages per group, but the engine has {held}"
        return batch

    def plan(self, engine: Engine, layout: str, batch: Batch) -> Plan:
        """The plan of exactly this step; if the engine has one plan for every step, that one."""
        shape = StepShape.of(
            engine.resolved.mesh,
            batch.group_rows,
            phase=self.phase,
            context=self.length(max(batch.group_rows)),
            logit_rows=batch.num_logit_rows,
        )
        return engine.resolved.plan or engine.plans.planner.plan(shape, layout)

    def _spans(self, rows: int, length: int) -> list[tuple[int, int]]:
        """First and last position of every sequence's rows in a group."""
        if self.phase == "decode":
            return [(length - 1, length)] * rows
        return [(0, min(length, rows - at)) for at in range(0, rows, length)]


def step_title(step: StepWork) -> str:
    """
    >>> [step_title(StepWork(rows=8, phase=phase, context=4)) for phase in ("decode", "prefill")]
    ['decode 8 x 4', 'prefill 8 by 4']
    """
    if step.phase == "decode":
        return f"decode {step.rows} x {step.context}"
    return f"prefill {step.rows}" + (f" by {step.context}" if 0 < step.context < step.rows else "")


def run_steps(engine: Engine, batch: Batch, plan: Plan, count: int) -> list[float]:
    """Run ``count`` equal steps; when the first was handed over, and when each was done."""
    waiting: deque[Future[list[Any]]] = deque()
    times = [perf_counter()]
    for _ in range(count):
        if len(waiting) == IN_FLIGHT:
            waiting.popleft().result()
            times.append(perf_counter())
        waiting.append(engine.ranks.submit(RankWorker.step, batch, plan))
    for future in waiting:
        future.result()
        times.append(perf_counter())
    return times


def attributed_op_times(engine: Engine, plan: Plan) -> list[list[float]]:
    """Seconds that each op cost in every run of ``plan`` since the last call (see :func:`attribute_waits`).

    :class:`OpSeconds` has read the steps of all ranks, and they have run no other plan."""
    config, num = engine.resolved.engine_config, plan.num_ops
    hosts = 1 if config.launch is None else config.launch.num_nodes
    at_once = hosts * num_cores() / engine.resolved.threads if config.run_on == "cpu" else engine.resolved.mesh.size
    is_collective = [op.is_collective for _, op in plan.ops()]
    ranks: list[list[float]] = engine.readings()
    starts = range(0, len(ranks[0]), num)
    return [
        attribute_waits([times[at : at + num] for times in ranks], is_collective, max(at_once, 1.0)) for at in starts
    ]


def fill_caches(engine: Engine) -> None:
    """Write random numbers into every rank's cache, as far as it reaches.

    Pages of memory that were never written are all one page to the system, which stays in the processor's caches: to
    read those costs much less than to read what a prompt has left there.
    """
    engine.instrument(_Filled)
    engine.instrument(None)


class _Filled:
    """An instrument that fills the caches when it is made, and is around no op."""

    def __init__(self, worker: Worker) -> None:
        draw = torch.Generator(worker.rank_context.device).manual_seed(worker.rank_context.rank)
        for cache in worker.caches():
            _fill(cache, draw)

    def __call__(
        self, layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        return operation


def _fill(cache: Tensor, draw: torch.Generator) -> None:
    some = torch.empty_like(cache[:_FILLED_AT_ONCE]).normal_(generator=draw)
    for start in range(0, len(cache), _FILLED_AT_ONCE):
        cache[start : start + _FILLED_AT_ONCE] = some[: len(cache) - start]
