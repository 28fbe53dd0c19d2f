"""Steps that ran, as a document that Perfetto and chrome://tracing open: one row per rank, and the host's above them.

The format is Chrome's trace event format, in its JSON object form. Every event of a rank is a step of the plan that
ran, with what was predicted for it beside what it took. :func:`trace_events` makes events one by one, so that a long
trace is never in memory as a whole.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from narrows.errors import ConfigError
from narrows.plan.plan import Op, OpKind, Plan

__all__ = ["Execution", "HostSpan", "TraceRun", "TracedStep", "check_trace_file", "trace_events", "write_trace"]

_HOST_TRACK, _STEP_TRACK, _RANK_TRACK = 1, 2, 1
"""Threads of the host's process (what it does; the steps, one after the other), and the one of a rank's."""


@dataclass(frozen=True, slots=True)
class Execution:
    """A plan as one rank ran it: one entry per step of the plan, in order, in seconds of the rank's clock.

    ``rows`` that it has left, ``received``: bytes that came from other ranks (0 but for collectives). The first
    ``num_replayed`` of them were replayed from a capture, without Python in between; 0: all ran op by op.
    """

    starts: Sequence[float]
    ends: Sequence[float]
    rows: Sequence[int]
    received: Sequence[int]
    num_replayed: int = 0

    def moved(self, seconds: float) -> Execution:
        """The same execution by a clock that is so far ahead of this one."""
        starts, ends = ([time + seconds for time in times] for times in (self.starts, self.ends))
        return Execution(starts, ends, self.rows, self.received, self.num_replayed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One step of an engine. ``submitted``, ``begun`` and ``done`` are seconds of the host's clock: when it was handed
    out, when the host had the answers of the step before (ranks go on before that), and when it had this one's.
    ``executions`` by rank. ``counters``: what the scheduler held then (requests running and waiting, pages)."""

    phase: str
    group_rows: tuple[int, ...]
    logit_rows: int
    plan: Plan
    submitted: float
    begun: float
    done: float
    executions: tuple[Execution, ...]
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class HostSpan:
    """Something that the host did, in seconds of its clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRun:
    """What one engine did. ``num_cut``: steps that ran after the last one that was kept. ``clocks``: by rank, the
    seconds by which its times were moved because its clock is not the host's; empty where all have one clock."""

    name: str
    steps: tuple[TracedStep, ...]
    host: tuple[HostSpan, ...]
    num_cut: int = 0
    clocks: Mapping[int, float]

    @property
    def num_ranks(self) -> int:
        return len(self.steps[0].executions) if self.steps else 0


def trace_events(runs: Sequence[TraceRun]) -> Iterator[dict[str, Any]]:
    """All events, track by track, each track in the order of time. Microseconds from the first of all events on."""
    times = [span.start for run in runs for span in run.host]
    times += [time for run in runs for step in run.steps for time in (step.submitted, *_first(step))]
    zero = min(times, default=0.0)
    pid = 1
    for run in runs:
        yield from _host_events(run, pid, zero)
        for rank in range(run.num_ranks):
            yield from _rank_events(run, rank, pid + 1 + rank, zero, host=pid)
        pid += 1 + run.num_ranks


def _first(step: TracedStep) -> list[float]:
    return [execution.starts[0] for execution in step.executions if execution.starts]


def check_trace_file(file: str) -> None:
    """Raises ConfigError if nothing can be written there; what is there, or is not, stays until a trace is written."""
    path = Path(file)
    was_there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--trace {file} cannot be written: {error.strerror}") from None


def write_trace(file: str, runs: Sequence[TraceRun], about: Mapping[str, Any]) -> int:
    """Write a trace, compressed if the name ends in ``.gz``; the number of events. ``about`` is kept in its metadata.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        if file.endswith(".gz"):
            with gzip.open(file, "wt", encoding="utf-8", compresslevel=5) as out:
                return _write(out, runs, about)
        with Path(file).open("w", encoding="utf-8") as out:
            return _write(out, runs, about)
    except OSError as error:
        raise ConfigError(f"--trace {file} cannot be written: {error.strerror or error}") from None


def _write(out: IO[str], runs: Sequence[TraceRun], about: Mapping[str, Any]) -> int:
    count = 0
    out.write('{"displayTimeUnit": "ms",\n"traceEvents": [\n')
    for event in trace_events(runs):
        out.write((",\n" if count else "") + json.dumps(event, separators=(",", ":")))
        count += 1
    out.write(f'\n],\n"otherData": {json.dumps({**about, **_told(runs)})}}}\n')
    return count


def _told(runs: Sequence[TraceRun]) -> dict[str, Any]:
    """What a reader must know, as text: metadata of a trace are shown as they are."""
    cut = {run.name: run.num_cut for run in runs if run.num_cut}
    moved = {run.name: {str(k): f"{s:.6f} s" for k, s in run.clocks.items()} for run in runs if run.clocks}
    out: dict[str, Any] = {
        "predicted": "of the plan's bucket at its upper end (priced_rows of the execution) and its priced context",
        "waits": "a collective's time holds the wait for the slowest rank",
        "clocks": "one clock for all ranks of this host (CLOCK_MONOTONIC)",
    }
    if cut:
        out["steps_not_traced"] = cut
    if moved:
        out["clocks"] = (
            "ranks with another clock than the host's (another machine) were moved so that their first step ends when "
            "its answers had come; between hosts nothing finer is aligned"
        )
        out["moved"] = moved
    return out


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _span(
    name: str, category: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A complete event; ``start`` and ``end`` in microseconds."""
    event = {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": round(end - start, 3),
    }
    return event | {"args": args} if args else event


def _names(pid: int, name: str, tracks: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for tid, track in tracks.items():
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": track}}


# -- the host ----------------------------------------------------------------------------------------------------------


def _host_events(run: TraceRun, pid: int, zero: float) -> Iterator[dict[str, Any]]:
    tracks = {_HOST_TRACK: "scheduling", _STEP_TRACK: "steps"}
    yield from _names(pid, f"{run.name}: host", tracks)
    did = [
        _span(span.name, "host", pid, _HOST_TRACK, _us(span.start - zero), _us(span.end - zero)) for span in run.host
    ]
    for number, step in enumerate(run.steps):  # an arrow begins in the span in which the step was handed out
        at = _us(step.submitted - zero)
        did += [_flow("s", run, number, rank, pid, _HOST_TRACK, at) for rank in range(run.num_ranks)]
    yield from sorted(did, key=lambda event: event["ts"])
    for number, step in enumerate(run.steps):
        rows = sum(step.group_rows)
        plan = step.plan
        args: dict[str, Any] = {
            "step": number,
            "phase": step.phase,
            "rows": rows,
            "group_rows": list(step.group_rows),
            "logit_rows": step.logit_rows,
            "plan": plan.layout_name,
            "priced_rows": plan.shape.rows.total,
            "predicted_us": _us(plan.seconds),
            "measured_us": _us(step.done - step.begun),
        }
        start, end = _us(step.begun - zero), _us(step.done - zero)
        yield _span(f"{step.phase} of {rows} rows", "step", pid, _STEP_TRACK, start, end, args)
    for step in run.steps:
        ts = _us(step.submitted - zero)
        for name, value in step.counters.items():
            yield {"name": name, "ph": "C", "pid": pid, "tid": 0, "ts": ts, "args": {name: value}}


def _flow(phase: str, run: TraceRun, number: int, rank: int, pid: int, tid: int, ts: float) -> dict[str, Any]:
    """An end of the arrow from a step of the host to a rank's execution."""
    event = {"name": "step", "cat": "flow", "ph": phase, "pid": pid, "tid": tid, "ts": ts}
    event["id"] = f"{run.name}/{number}/{rank}"
    return event | {"bp": "e"} if phase == "f" else event


# -- ranks -------------------------------------------------------------------------------------------------------------


def _rank_events(run: TraceRun, rank: int, pid: int, zero: float, *, host: int) -> Iterator[dict[str, Any]]:
    yield from _names(pid, f"{run.name}: rank {rank}", {_RANK_TRACK: "plan"})
    for number, traced in enumerate(run.steps):
        execution, plan = traced.executions[rank], traced.plan
        if not execution.starts:
            continue
        start, end = _us(execution.starts[0] - zero), _us(execution.ends[-1] - zero)
        args = {
            "step": number,
            "phase": traced.phase,
            "priced_rows": plan.shape.rows.total,
            "predicted_us": _us(plan.seconds),
            "measured_us": round(end - start, 3),
            "bytes_received": sum(execution.received),
            "ran": _ran(execution),
        }
        yield _span(f"execution {traced.phase}", "execution", pid, _RANK_TRACK, start, end, args)
        yield _flow("f", run, number, rank, pid, _RANK_TRACK, start)
        for i, (layer, op) in enumerate(plan.ops()):
            at, to = _us(execution.starts[i] - zero), _us(execution.ends[i] - zero)
            yield _span(
                _title(op), _category(op), pid, _RANK_TRACK, at, to, _args(layer, op, execution, i, traced, to - at)
            )


def _ran(execution: Execution) -> str:
    """How the operations of an execution were run."""
    if not execution.num_replayed:
        return "op by op"
    rest = len(execution.starts) - execution.num_replayed
    return "replayed" if not rest else f"{execution.num_replayed} operations replayed, {rest} op by op"


def _title(op: Op) -> str:
    if op.move is not None:
        return f"{op.name} {op.move.axes}".strip()
    return op.name


def _category(op: Op) -> str:
    return "collective" if op.is_collective else str(op.kind)


def _args(
    layer: int | None, op: Op, execution: Execution, i: int, traced: TracedStep, measured_us: float
) -> dict[str, Any]:
    """What is shown of a step: where, what, how much, and predicted beside measured."""
    mesh = traced.plan.mesh
    reads, leaves = (layout.title(mesh) or str(layout) for layout in (op.layout, op.leaves))
    args: dict[str, Any] = {} if layer is None else {"layer": layer}
    if op.kind is not OpKind.STAGE:
        args["before"] = op.boundary
    args |= {
        "fields": "+".join(op.writes),
        "layout": reads if reads == leaves else f"{reads} -> {leaves}",
        "class": str(op.price_class),
        "rows": execution.rows[i],
        "predicted_us": _us(op.seconds),
        "measured_us": round(measured_us, 3),
        "source": op.source.label,
    }
    if op.is_collective:
        args["bytes_received"] = execution.received[i]
        args["bytes_all_ranks"] = sum(other.received[i] for other in traced.executions)
        if op.encoded:
            args["encoded"] = "+".join(f"{name} {encoding}" for name, encoding in op.encoded.items())
    return args
