"""Where the time went: seconds, rows and bytes per stage and move, measured on every rank as plans are walked.

Knows bound steps, plans and clocks. A GPU is waited for after every step, so that a step's time is its own; the run as
a whole is slower for it. A collective's seconds hold the wait for the slowest rank, as they do in any profiler. Of
steps that a tape repeats (`tapes.py`) the seconds are the tape's own, without Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from narrows.comm.device import finished
from narrows.engine.program import Frame, Operation, Registers, Repeated
from narrows.engine.worker import Worker
from narrows.plan.book import share_of_plan
from narrows.plan.plan import Plan, Step
from narrows.sched.batch import Batch

__all__ = ["BETWEEN", "Counts", "Expected", "ProfileRow", "StepClock", "profile_rows"]


BETWEEN = "between"
"""The class under which is booked what lies between the steps of a walk: Python, registers, clocks."""


class _Kind(NamedTuple):
    """What tells steps apart."""

    phase: str
    price_class: str
    name: str
    boundary: str
    fields: tuple[str, ...]
    layouts: str


@dataclass(slots=True)
class _Count:
    calls: int = 0
    seconds: float = 0.0
    rows: int = 0
    nbytes: int = 0


def _kind(phase: str, step: Step) -> _Kind:
    where = "" if step.boundary == step.name else step.boundary
    layouts = str(step.layout) if step.layout == step.leaves else f"{step.layout} -> {step.leaves}"
    return _Kind(phase, step.price_class.value, step.name, where, step.writes, layouts)


_IDS = 0
"""The register that a walk begins with: whoever reads it is the first step."""

Counts = dict[_Kind, _Count]
"""What one rank's clock has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One kind of step over a whole run. Seconds are the mean over ranks; rows are those of the busiest rank,
    bytes what its steps wrote. ``predicted``: seconds that the plans which ran promised for it; 0: not asked."""

    phase: str
    price_class: str
    name: str
    boundary: str
    fields: tuple[str, ...]
    layouts: str
    calls: int
    seconds: float
    rows: int
    nbytes: int
    predicted: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.seconds / self.predicted if self.predicted else None


class Expected:
    """What the plans of the steps that run predict, kind by kind of step; :meth:`add` is for :meth:`Engine.observe`.

    A plan is priced at the upper end of its bucket: a prefill step takes its share of that by rows; a decode step,
    which reads the same weights whatever its rows, all of it. It is the time of the rank that has most.
    """

    def __init__(self) -> None:
        self.seconds: dict[_Kind, float] = {}

    def add(self, batch: Batch, plan: Plan) -> None:
        """A step that was handed out."""
        share = share_of_plan(plan, batch)
        for segment in plan.segments:
            for step in segment.steps:
                kind = _kind(batch.phase, step)
                self.seconds[kind] = self.seconds.get(kind, 0.0) + share * step.seconds * segment.times


class StepClock:
    """A clock around every step of one rank, and between them; an instrument of :meth:`Engine.instrument`."""

    def __init__(self, worker: Worker) -> None:
        self._counts: Counts = {}
        self._ended = 0.0
        self.device = worker.place.device

    def readings(self) -> Counts:
        counts, self._counts = self._counts, {}
        return counts

    def begins(self, phase: str, *, first: bool) -> float:
        """A step of a walk begins now, ``first`` or after another."""
        now = perf_counter()
        if not first:
            between = self._counts.setdefault(_Kind(phase, BETWEEN, "between steps", "", (), ""), _Count())
            between.calls += 1
            between.seconds += now - self._ended
        return now

    def ended(self, kind: _Kind, seconds: float, rows: int, nbytes: int) -> None:
        """A step has taken so long and left so much."""
        count = self._counts.setdefault(kind, _Count())
        count.calls += 1
        count.seconds += seconds
        count.rows += rows
        count.nbytes += nbytes
        self._ended = perf_counter()

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        return _Timed(self, operation, _IDS in reads, writes, _kind("", step)[1:])


class _Timed(Repeated):
    """A bound step with the clock around it; a tape that repeats it tells the clock."""

    def __init__(
        self,
        clock: StepClock,
        operation: Operation,
        is_first: bool,
        writes: tuple[int, ...],
        what: tuple[str, str, str, tuple[str, ...], str],
    ) -> None:
        self._clock, self._operation, self._is_first = clock, operation, is_first
        self._writes, self._what = writes, what

    def __call__(self, regs: Registers, frame: Frame) -> None:
        start = self._clock.begins(frame.phase, first=self._is_first)
        self._operation(regs, frame)
        finished(self._clock.device)
        self.repeated(regs, frame)(perf_counter() - start)

    def repeated(self, regs: Registers, frame: Frame) -> Callable[[float], None]:
        kind = _Kind(frame.phase, *self._what)
        rows, nbytes = regs[self._writes[0]].shape[0], sum(regs[i].nbytes for i in self._writes)
        return lambda seconds: self._clock.ended(kind, seconds, rows, nbytes)


def profile_rows(ranks: Sequence[Counts], expected: Expected | None = None) -> list[ProfileRow]:
    """The clocks of all ranks as one row per kind of step, prefill before decode, in the order in which the steps
    first ran, and what is between them last; with what was ``expected`` of them."""
    kinds = list(dict.fromkeys(kind for counts in ranks for kind in counts))
    kinds.sort(key=lambda kind: (kind.phase != "prefill", kind.price_class == BETWEEN))
    out: list[ProfileRow] = []
    for kind in kinds:
        held = [counts[kind] for counts in ranks if kind in counts]
        out.append(
            ProfileRow(
                **kind._asdict(),
                calls=max(count.calls for count in held),
                seconds=sum(count.seconds for count in held) / len(ranks),
                rows=max(count.rows for count in held),
                nbytes=max(count.nbytes for count in held),
                predicted=expected.seconds.get(kind, 0.0) if expected is not None else 0.0,
            )
        )
    return out
