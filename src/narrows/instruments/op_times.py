"""Time per op: seconds, rows and bytes per stage and move, read from the records of every rank's steps.

A GPU is waited for after every operation, so that its time is its own; the run as a whole is slower for it. A
collective's seconds hold the wait for the slowest rank, as they do in any profiler. Of steps that a capture replays
(`capture.py`) the seconds are those of its calls, without Python between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from narrows.engine.step_record import StepRecord, Wants
from narrows.plan.cache import share_of_plan
from narrows.plan.plan import Op, Plan
from narrows.sched.batch import Batch

if TYPE_CHECKING:
    from narrows.engine.worker import Worker

__all__ = ["BETWEEN", "Counts", "Expected", "OpClock", "OpTime", "op_times"]


BETWEEN = "between"
"""The class of the time between the ops of a plan: Python, registers, clocks."""


class _Kind(NamedTuple):
    """What distinguishes ops."""

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


def _kind(phase: str, op: Op) -> _Kind:
    where = "" if op.boundary == op.name else op.boundary
    layouts = str(op.layout) if op.layout == op.leaves else f"{op.layout} -> {op.leaves}"
    return _Kind(phase, op.price_class.value, op.name, where, op.writes, layouts)


Counts = dict[_Kind, _Count]
"""What one rank's clock has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """One kind of op over a whole run. Seconds are the mean over ranks; rows are those of the busiest rank,
    bytes what its ops wrote. ``predicted``: seconds that the plans which ran promised for it; 0: not predicted."""

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
    """What the plans of the steps that run predict, kind by kind of op; :meth:`add` is for :meth:`Engine.observe`.

    A plan is priced at the upper end of its bucket: a prefill step takes its share of that by rows; a decode step,
    which reads the same weights whatever its rows, all of it. It is the time of the rank that has most.
    """

    def __init__(self) -> None:
        self.seconds: dict[_Kind, float] = {}

    def add(self, batch: Batch, plan: Plan) -> None:
        """A step that was handed out."""
        share = share_of_plan(plan, batch)
        for segment in plan.segments:
            for op in segment.ops:
                kind = _kind(batch.phase, op)
                self.seconds[kind] = self.seconds.get(kind, 0.0) + share * op.seconds * segment.times


class OpClock:
    """Times of every operation of one rank, and between them, by kind; a reader of :meth:`Engine.instrument`."""

    wants = Wants.EVERY_OP

    def __init__(self, worker: Worker) -> None:
        self._counts: Counts = {}
        self._kinds: dict[tuple[int, str], tuple[object, list[_Kind]]] = {}

    def readings(self) -> Counts:
        """By kind of op."""
        counts, self._counts = self._counts, {}
        return counts

    def take(self, record: StepRecord) -> None:
        """Add a step's operations. Between replayed ones there is nothing."""
        kinds, counts = self._kinds_of(record), self._counts
        for i, number in enumerate(record.numbers):
            count = counts.setdefault(kinds[number], _Count())
            count.calls += 1
            count.seconds += record.ends[i] - record.starts[i]
            count.rows += record.rows[i]
            count.nbytes += record.nbytes[i]
            if i and number >= record.num_replayed:
                between = counts.setdefault(_Kind(record.phase, BETWEEN, "between ops", "", (), ""), _Count())
                between.calls += 1
                between.seconds += record.starts[i] - record.ends[i - 1]

    def _kinds_of(self, record: StepRecord) -> list[_Kind]:
        """By number of the operation; made once per bound plan and phase."""
        key = id(record.ops), record.phase
        held = self._kinds.get(key)
        if held is None or held[0] is not record.ops:
            held = self._kinds[key] = (record.ops, [_kind(record.phase, bound.op) for bound in record.ops])
        return held[1]


def op_times(ranks: Sequence[Counts], expected: Expected | None = None) -> list[OpTime]:
    """The clocks of all ranks as one row per kind of step, prefill before decode, in the order in which the steps
    first ran, and what is between them last; with what was ``expected`` of them."""
    kinds = list(dict.fromkeys(kind for counts in ranks for kind in counts))
    kinds.sort(key=lambda kind: (kind.phase != "prefill", kind.price_class == BETWEEN))
    out: list[OpTime] = []
    for kind in kinds:
        held = [counts[kind] for counts in ranks if kind in counts]
        out.append(
            OpTime(
                **kind._asdict(),
                calls=max(count.calls for count in held),
                seconds=sum(count.seconds for count in held) / len(ranks),
                rows=max(count.rows for count in held),
                nbytes=max(count.nbytes for count in held),
                predicted=expected.seconds.get(kind, 0.0) if expected is not None else 0.0,
            )
        )
    return out
