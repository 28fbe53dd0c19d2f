"""Measured times of steps beside their predictions, by bucket of the plan cache.

A step's time is the coordinator's: from when the ranks had the step and were free for it until rank 0 had answered.
That includes what no plan prices (inputs on their way, samples, answers), which matters for steps of a millisecond. A
prediction is that of the bucket's upper end, at the context of the step's rows. It is scaled by rows for a prefill
step; a decode step reads the same weights whatever its rows, so there it is taken as it is.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from narrows.arch.stages import PriceClass
from narrows.errors import ConfigError
from narrows.layout import MoveKind
from narrows.plan.cache import PlanKey, bucket, share_of_plan
from narrows.plan.plan import Plan
from narrows.sched.batch import Batch

__all__ = ["BucketTimes", "DriftRule", "StepTimes", "predicted_collectives"]

_RECENT = 101
"""Steps whose times a bucket keeps, for its median."""

PlanClass = tuple[str, int, str]
"""(phase, bucket of rows, layout)."""


def predicted_collectives(plan: Plan) -> dict[tuple[str, str], float]:
    """Predicted seconds of a plan's collectives by layouts and kind, as clocks on ranks count them."""
    out: dict[tuple[str, str], float] = {}
    for segment in plan.segments:
        for op in segment.ops:
            move = op.move
            if move is None or move.kind is MoveKind.SLICE:
                continue
            assert op.price_class is PriceClass.COMMUNICATION
            kind = (f"{move.src} -> {move.dst}", str(move.kind))
            out[kind] = out.get(kind, 0.0) + op.seconds * segment.times
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """When a bucket's times are off its prediction: more than ``factor`` times as long, or as short, in the median of
    the last steps, ``least_steps`` or more.

    Raises:
        ConfigError: a factor that is not more than 1.
    """

    factor: float = 1.5
    least_steps: int = 20

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ConfigError(f"--drift-factor is {self.factor:g}; it must be more than 1")


@dataclass(slots=True)
class BucketTimes:
    """Steps of one bucket: how many, and seconds in all; of the last hundred also one by one."""

    plan: Plan
    steps: int = 0
    predicted: float = 0.0
    measured: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    warned: bool = False

    @property
    def median_measured(self) -> float:
        """Median seconds of the last steps."""
        return median(measured for _, measured in self.recent)

    @property
    def median_predicted(self) -> float:
        """Median of the predictions for the same steps."""
        return median(predicted for predicted, _ in self.recent)

    @property
    def ratio(self) -> float:
        """Measured over predicted, the median over the last steps."""
        return median(measured / predicted for predicted, measured in self.recent)

    def document(self) -> dict[str, Any]:
        """For ``/server_info``."""
        return {
            "steps": self.steps,
            "measured_ms_median": round(self.median_measured * 1e3, 4),
            "measured_ms_mean": round(self.measured / self.steps * 1e3, 4),
            "predicted_ms_of_these_steps": round(self.median_predicted * 1e3, 4),
            "measured_over_predicted": round(self.ratio, 3),
        }


class PlanClassTimes(NamedTuple):
    """Seconds of all steps of one class of plans."""

    predicted: float = 0.0
    measured: float = 0.0


class _Timed(NamedTuple):
    batch: Batch
    plan: Plan
    key: PlanKey
    needs_logits: bool


class StepTimes:
    """The steps of one engine, timed as they end, in order.

    :meth:`handed_out` and :meth:`ended` are called by the engine's loop; a step's answer comes on another thread, which
    notes the time and nothing else.
    """

    def __init__(self, rule: DriftRule) -> None:
        self.rule = rule
        self.buckets: dict[tuple[PlanKey, bool], BucketTimes] = {}
        self.classes: dict[PlanClass, PlanClassTimes] = {}
        self.collectives: dict[tuple[str, str], float] = {}
        """Predicted seconds of the collectives that ran, by layouts and kind."""
        self._of_plan: dict[int, tuple[Plan, dict[tuple[str, str], float]]] = {}
        self._free = 0.0

    def forget_ranks(self) -> None:
        """Other ranks have taken the place of those that ran until now: their plans are new objects."""
        self._of_plan.clear()
        self._free = 0.0

    def documents(self) -> dict[int, dict[str, Any]]:
        """The entry of ``/server_info`` on the steps of a plan, by its identity."""
        return {id(found.plan): found.document() for found in self.buckets.values()}

    @staticmethod
    def watch(future: Future[Any]) -> list[float]:
        """When a step was handed out, and, once it is done, when that was: ``perf_counter``."""
        times = [perf_counter()]
        future.add_done_callback(lambda _: times.append(perf_counter()))
        return times

    def ended(self, batch: Batch, plan: Plan, predicted: float, times: list[float]) -> str:
        """A step of so many ``predicted`` seconds is done; a line for people if its bucket has just been found off its
        prediction, else empty."""
        if len(times) < 2:  # its future was done before the callback that notes when
            times.append(perf_counter())
        begun, done = max(times[0], self._free), times[1]
        self._free = done
        measured = max(done - begun, 0.0)
        self._count_collectives(plan, batch)
        name = (batch.phase, bucket(batch.num_rows), plan.layout_name)
        old = self.classes.get(name, PlanClassTimes())
        self.classes[name] = PlanClassTimes(old.predicted + predicted, old.measured + measured)
        key = PlanKey.of(batch.phase, batch.group_rows, batch.num_logit_rows)
        found = self.buckets.get((key, batch.needs_logits))
        if found is None:
            found = self.buckets[key, batch.needs_logits] = BucketTimes(plan)
        found.plan = plan
        found.steps += 1
        found.predicted += predicted
        found.measured += measured
        found.recent.append((predicted, measured))
        return self._drift(key, found, needs_logits=batch.needs_logits)

    def _count_collectives(self, plan: Plan, batch: Batch) -> None:
        held = self._of_plan.get(id(plan))
        if held is None or held[0] is not plan:
            held = self._of_plan[id(plan)] = (plan, predicted_collectives(plan))
        share = share_of_plan(plan, batch)
        for kind, seconds in held[1].items():
            self.collectives[kind] = self.collectives.get(kind, 0.0) + seconds * share

    def _drift(self, key: PlanKey, found: BucketTimes, *, needs_logits: bool) -> str:
        rule = self.rule
        if found.warned or found.steps < rule.least_steps or found.steps % rule.least_steps:
            return ""
        ratio = found.ratio
        if 1 / rule.factor <= ratio <= rule.factor:
            return ""
        found.warned = True
        logits = f"{key.logit_rows} with logits" if needs_logits else f"{key.logit_rows} sampled"
        return (
            f"{key.phase} steps of up to {key.rows} rows ({logits}; {found.plan.layout_name}) take "
            f"{found.median_measured * 1e3:.3g} ms where {found.median_predicted * 1e3:.3g} ms were predicted "
            f"({ratio:.2g} times, median of the last {len(found.recent)}): plans may not be the fastest here; "
            "run narrows calibrate"
        )
