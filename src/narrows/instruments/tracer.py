"""Records the next steps of an engine: when every rank ran each operation, and what the host did meanwhile.

`trace_events.py` writes the record. A rank keeps four numbers per operation, in arrays, for a given number of steps;
replayed steps are kept as op-by-op ones are. Its clock is ``perf_counter``, on Linux CLOCK_MONOTONIC: the same for all
processes of a host, and not between hosts. A GPU is waited for after every operation, so that its time is its own; the
run as a whole is slower for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from narrows.engine.calls import RankWorker
from narrows.engine.core import Engine
from narrows.engine.step_record import StepRecord, Wants
from narrows.instruments.trace_events import Execution, HostSpan, TracedStep, TraceRun
from narrows.plan.plan import Plan
from narrows.ranks.calls import Ranks
from narrows.sched.batch import Batch
from narrows.sched.stats import SchedulerStats

if TYPE_CHECKING:
    from narrows.engine.worker import Worker

__all__ = ["DEFAULT_STEPS", "RankTracer", "Tracer"]

DEFAULT_STEPS = 200
"""Steps that are kept by default: 10 MB per rank for 60 layers."""
_INSTRUMENT = "trace"
_SLACK_S = 0.005
"""By how much a rank's times may lie outside the host's, which gets them later, before its clock counts as another."""
_SPANS_PER_STEP = 8


class Recorded(NamedTuple):
    """What one rank has kept: for each execution its end in the arrays and the number of its replayed operations; for
    each operation four numbers."""

    bounds: array[int]
    replayed: array[int]
    starts: array[float]
    ends: array[float]
    rows: array[int]
    received: array[int]

    def execution(self, number: int) -> Execution:
        """The ``number``-th execution; empty if it was not recorded."""
        if number >= len(self.bounds):
            return Execution((), (), (), ())
        start, stop = self.bounds[number - 1] if number else 0, self.bounds[number]
        own = slice(start, stop)
        return Execution(self.starts[own], self.ends[own], self.rows[own], self.received[own], self.replayed[number])


class RankTracer:
    """Keeps the first records of one rank's steps; a reader of :meth:`Engine.instrument`."""

    def __init__(self, worker: Worker, *, num_steps: int) -> None:
        self._left = num_steps
        self._kept = _nothing()

    @property
    def wants(self) -> Wants:
        """Nothing once as many steps as were requested have been kept."""
        return Wants.EVERY_OP if self._left else Wants.NOTHING

    def readings(self) -> Recorded:
        """What was recorded. Nothing is any more."""
        kept, self._kept, self._left = self._kept, _nothing(), 0
        return kept

    def take(self, record: StepRecord) -> None:
        """Keep a step, if there is room for one more."""
        if not self._left:
            return
        self._left -= 1
        kept = self._kept
        kept.starts.extend(record.starts)
        kept.ends.extend(record.ends)
        kept.rows.extend(record.rows)
        kept.received.extend(record.received)
        kept.replayed.append(record.num_replayed)
        kept.bounds.append(len(kept.starts))


def _nothing() -> Recorded:
    return Recorded(array("q"), array("q"), array("d"), array("d"), array("q"), array("q"))


@dataclass(slots=True)
class _Submitted:
    """A step as the host handed it out."""

    batch_rows: tuple[int, ...]
    logit_rows: int
    phase: str
    plan: Plan
    counters: dict[str, int]
    at: float
    done: float | None = None


@dataclass(slots=True)
class Tracer:
    """Records the next ``num_steps`` steps of an engine, on the host and on every rank, until :meth:`end`.

    An engine has one trace at a time: a new one replaces the old."""

    engine: Engine
    num_steps: int
    ranks: Ranks[RankWorker] = field(init=False)
    _steps: list[_Submitted] = field(default_factory=list)
    _host: list[HostSpan] = field(default_factory=list)
    _num_cut: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self.ranks = self.engine.ranks
        self.engine.trace_with(self)
        # Calls reach ranks in order: they record what is handed out from now on.
        self.ranks.submit(RankWorker.instrument, partial(RankTracer, num_steps=self.num_steps), _INSTRUMENT)

    @property
    def full(self) -> bool:
        """Whether as many steps as were requested have been handed out."""
        return self._closed or len(self._steps) >= self.num_steps

    @property
    def done(self) -> bool:
        """Whether it is full and all of its steps have ended."""
        return self.full and (not self._steps or self._steps[-1].done is not None)

    def submit(self, batch: Batch, plan: Plan, keep_logits: bool, stats: SchedulerStats) -> Future[list[Any]]:
        """Hand a step to the ranks, and note it."""
        assert not self.full
        start = perf_counter()
        future = self.ranks.submit(RankWorker.step, batch, plan, keep_logits)
        end = perf_counter()
        counters = {"running": stats.running, "waiting": stats.waiting, "kv_pages_used": stats.kv_pages_used}
        step = _Submitted(batch.group_rows, batch.num_logit_rows, batch.phase, plan, counters, start)
        self._steps.append(step)
        self._host.append(HostSpan("hand out", start, end))

        def ended(_: object) -> None:
            step.done = perf_counter()

        future.add_done_callback(ended)
        return future

    def on_host(self, name: str, start: float, end: float) -> None:
        """Note what the host has done; ``start`` and ``end`` of ``perf_counter``."""
        if not self.done and len(self._host) < _SPANS_PER_STEP * self.num_steps:
            self._host.append(HostSpan(name, start, end))

    def passed(self) -> None:
        """A step was handed out that is not recorded, because as many as were requested have been."""
        self._num_cut += 1

    def end(self) -> Future[list[Any]]:
        """Record nothing more; the ranks' records, for :meth:`run`, once they have run what they were given."""
        self._closed = True
        self.engine.trace_with(None)
        recorded = self.ranks.submit(RankWorker.readings, _INSTRUMENT)
        self.ranks.submit(RankWorker.instrument, None, _INSTRUMENT)
        return recorded

    def run(self, recorded: Sequence[Recorded], name: str) -> TraceRun:
        """The whole trace, from what :meth:`end` has given."""
        steps, clocks, free = [], dict[int, float](), 0.0
        for number, step in enumerate(self._steps):
            if step.done is None:
                break
            executions = [kept.execution(number) for kept in recorded]
            for rank, execution in enumerate(executions):
                if not number and (moved := _other_clock(execution, step)):
                    clocks[rank] = moved
            steps.append(
                TracedStep(
                    phase=step.phase,
                    group_rows=step.batch_rows,
                    logit_rows=step.logit_rows,
                    plan=step.plan,
                    submitted=step.at,
                    begun=max(step.at, free),
                    done=step.done,
                    executions=tuple(
                        execution.moved(clocks.get(rank, 0.0)) for rank, execution in enumerate(executions)
                    ),
                    counters=step.counters,
                )
            )
            free = step.done
        return TraceRun(name=name, steps=tuple(steps), host=tuple(self._host), num_cut=self._num_cut, clocks=clocks)


def _other_clock(execution: Execution, step: _Submitted) -> float:
    """Seconds to move a rank's times by, so that its execution ends when the host has heard of it; 0: none."""
    assert step.done is not None
    if not execution.starts or (execution.starts[0] > step.at - _SLACK_S and execution.ends[-1] < step.done + _SLACK_S):
        return 0.0
    return step.done - execution.ends[-1]
