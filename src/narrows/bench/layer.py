"""Where the time of one step goes, per layout: the published table, the predicted time beside the measured one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from narrows.arch.stages import PriceClass
from narrows.bench.engines import RunningVariant, Variant, running_variants
from narrows.bench.interleave import interleave
from narrows.bench.results import Outcome, Series
from narrows.calibrate.step_work import StepWork, fill_caches
from narrows.errors import ConfigError
from narrows.instruments.op_times import BETWEEN, OpClock, op_times
from narrows.instruments.trace_file import TraceFile
from narrows.plan.plan import Plan
from narrows.plan.report.evidence import evidence_line
from narrows.sched.batch import Batch

__all__ = ["OUTSIDE", "PUBLISHED", "TOTAL", "layer", "published_parts"]

PUBLISHED = {
    PriceClass.QKV_A_PROJ: "low-rank projection",
    PriceClass.NORM: "norm",
    PriceClass.COMMUNICATION: "communication",
}
"""The rows of the published table; all other classes of steps are the rest."""
REST, TOTAL, OUTSIDE = "rest", "whole step", "outside the plan"


def layer(
    variants: Sequence[Variant],
    work: StepWork,
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    trace: TraceFile | None = None,
) -> Outcome:
    """Milliseconds per part of the step: the mean over ranks, in which a collective holds the wait for the slowest."""
    if work.rows < 1 or (work.phase == "decode" and work.context < 2):
        raise ConfigError(f"--rows {work.rows} must be at least 1, and a decode step needs --context of 2 or more")
    with running_variants([replace(one, config=work.limits(one.config)) for one in variants], trace) as running:
        for engine in {id(one.shared): one.shared for one in running}.values():
            if work.phase == "decode":
                fill_caches(engine)
            engine.instrument(OpClock)
        steps = {one.name: _step(one, work) for one in running}
        ways = {one.name: partial(_run, one, *steps[one.name]) for one in running}
        found = interleave(ways, rounds=rounds, warmup=warmup, progress=progress)
    predicted = {
        name: published_parts({str(c): s for c, s in plan.totals().items()}) for name, (_, plan) in steps.items()
    }
    device = running[0].resolved.deployment.device.name
    for name, (_, plan) in steps.items():
        predicted[name][TOTAL] = plan.seconds
    seen = dict.fromkeys(part for given in found.values() for one in given for part in one)
    parts = [part for part in seen if part not in (OUTSIDE, TOTAL)] + [OUTSIDE, TOTAL]
    return Outcome(
        series=tuple(
            Series(
                work=part,
                unit="ms",
                values={name: tuple(1e3 * one.get(part, 0.0) for one in given) for name, given in found.items()},
                facts={name: {"predicted_ms": 1e3 * parts[part]} for name, parts in predicted.items() if part in parts},
            )
            for part in parts
        ),
        notes=(
            f"one {work.phase} step of {work.rows} rows; predicted for the device "
            f"{device}, which need not be this machine",
            *filter(None, [evidence_line(device, {name: plan for name, (_, plan) in steps.items()})]),
        ),
    )


def published_parts(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds per class of steps as the rows of the published table, then the classes of which the rest consists."""
    parts = {title: seconds.get(str(price_class), 0.0) for price_class, title in PUBLISHED.items()}
    others = {name: s for name, s in seconds.items() if PriceClass(name) not in PUBLISHED and s}
    return parts | {REST: sum(others.values())} | {f"  {name}": s for name, s in others.items()}


def _step(one: RunningVariant, work: StepWork) -> tuple[Batch, Plan]:
    engine = one.engine()
    batch = work.batch_for(engine)
    return batch, work.plan(engine, one.layout, batch)


def _run(one: RunningVariant, batch: Batch, plan: Plan) -> dict[str, float]:
    """Seconds per part of one step."""
    engine = one.engine()
    start = perf_counter()
    engine.submit(batch, plan=plan).result()
    seconds = perf_counter() - start
    by_class = dict.fromkeys(map(str, PriceClass), 0.0)
    for row in op_times(engine.readings()):
        if row.price_class != BETWEEN:
            by_class[row.price_class] += row.seconds
    executed = sum(by_class.values())
    return published_parts(by_class) | {OUTSIDE: max(seconds - executed, 0.0), TOTAL: seconds}
