"""The trace document against Chrome's trace event format: valid JSON, events that nest, time that goes on in a track.

The format is that of "Trace Event Format" (Google, 2016), which Perfetto and chrome://tracing read: an object with
``traceEvents``; ``X`` events have ts and dur in microseconds, ``M`` names, ``C`` counters, ``s`` and ``f`` flows.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.instruments.trace_events import Execution, HostSpan, TracedStep, TraceRun, check_trace_file, write_trace
from narrows.layout import Mesh, MoveKind
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner

MESH = Mesh.of(dp=2, tp=2)
STEP_S = 1e-3


def plan_of(rows: int) -> Plan:
    deployment = Deployment(config=preset("deepseek-v2-lite"), mesh=MESH, device=device("h100"))
    shape = StepShape.of(MESH, (rows, rows), phase="prefill", context=512)
    return Planner(deployment, WeightSharding()).plan(shape)


def execution(plan: Plan, start: float, *, received: int) -> Execution:
    """Steps of equal length, one right after the other."""
    starts = [start + i * STEP_S / plan.num_ops for i in range(plan.num_ops)]
    crosses = [op.move is not None and op.move.kind is not MoveKind.SLICE for _, op in plan.ops()]
    ends = [*starts[1:], start + STEP_S]
    return Execution(starts, ends, [1] * plan.num_ops, [received * crossing for crossing in crosses])


def run_of(num_steps: int = 3, **more: Any) -> TraceRun:
    plan = plan_of(256)
    steps = [
        TracedStep(
            phase="prefill",
            group_rows=(200, 156),
            logit_rows=2,
            plan=plan,
            submitted=100 + 2 * n * STEP_S,
            begun=100 + 2 * n * STEP_S,
            done=100 + (2 * n + 1.5) * STEP_S,
            executions=tuple(
                execution(plan, 100 + (2 * n + 0.1) * STEP_S, received=10 * (rank + 1)) for rank in range(4)
            ),
            counters={"running": n, "waiting": 1, "kv_pages_used": 7},
        )
        for n in range(num_steps)
    ]
    host = [HostSpan("hand out", 100 + 2 * n * STEP_S, 100 + (2 * n + 0.05) * STEP_S) for n in range(num_steps)]
    return TraceRun(name="some model", steps=tuple(steps), host=tuple(reversed(host)), **{"clocks": {}, **more})


def written(tmp_path: Path, *runs: TraceRun, name: str = "trace.json") -> dict[str, Any]:
    file = tmp_path / name
    count = write_trace(str(file), runs, {"model": "some model"})
    text = gzip.decompress(file.read_bytes()) if name.endswith(".gz") else file.read_bytes()
    document = json.loads(text)
    assert len(document["traceEvents"]) == count
    return document


REQUIRED = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur"},
    "M": {"name", "pid", "tid", "args"},
    "C": {"name", "pid", "ts", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def test_events_have_the_formats_fields_and_ordered_times(tmp_path: Path) -> None:
    document = written(tmp_path, run_of(), run_of())
    last: dict[tuple[Any, ...], float] = {}
    for event in document["traceEvents"]:
        assert set(event) >= REQUIRED[event["ph"]], event
        if event["ph"] == "M":
            continue
        track = (event["pid"], event["tid"], event["name"] if event["ph"] == "C" else "")
        assert event["ts"] >= max(last.get(track, 0.0), 0.0) and event.get("dur", 0.0) >= 0.0, event
        last[track] = event["ts"]
    assert len({(pid, tid) for pid, tid, name in last if not name}) == 2 * (2 + 4)
    assert min(event["ts"] for event in document["traceEvents"] if "ts" in event) == 0.0


def test_events_of_a_track_nest(tmp_path: Path) -> None:
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in written(tmp_path, run_of())["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_spans: list[tuple[float, float]] = []
        for start, end in spans:
            while open_spans and open_spans[-1][1] <= start + 0.002:  # times are rounded to a nanosecond
                open_spans.pop()
            assert not open_spans or end <= open_spans[-1][1] + 0.002, "it ends after what it has begun in"
            open_spans.append((start, end))


def test_every_rank_has_every_op_with_prediction_and_bytes(tmp_path: Path) -> None:
    run = run_of(2)
    events = written(tmp_path, run)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values()) == ["some model: host", *(f"some model: rank {rank}" for rank in range(4))]
    plan = run.steps[0].plan
    for rank in range(4):
        pid = next(pid for pid, name in names.items() if name.endswith(f"rank {rank}"))
        mine = [event for event in events if event["pid"] == pid and event["ph"] == "X"]
        executions = [event for event in mine if event["cat"] == "execution"]
        steps = [event for event in mine if event["cat"] != "execution"]
        assert len(executions) == 2 and len(steps) == 2 * plan.num_ops
        for (layer, op), event in zip([*plan.ops()] * 2, steps, strict=True):
            args = event["args"]
            assert event["name"].startswith(op.name) and args.get("layer") == layer
            assert args["predicted_us"] == pytest.approx(op.ps / 1e6, abs=1e-3)
            assert args["measured_us"] == pytest.approx(event["dur"], abs=2e-3) and args["source"] == op.source.label
            if event["cat"] == "collective":
                assert args["bytes_received"] == 10 * (rank + 1) and args["bytes_all_ranks"] == 100
            else:
                assert "bytes_received" not in args
        assert executions[0]["args"]["predicted_us"] == pytest.approx(plan.ps / 1e6, abs=1e-3)


def test_arrows_lead_from_the_coordinator_to_every_rank(tmp_path: Path) -> None:
    events = written(tmp_path, run_of(2))["traceEvents"]
    begun, ended = ([event for event in events if event["ph"] == kind] for kind in "sf")
    assert len(begun) == len({event["id"] for event in begun}) == 2 * 4
    ends = {event["id"]: event for event in ended}
    for event in begun:
        end = ends[event["id"]]
        assert (end["name"], end["cat"]) == (event["name"], event["cat"]) and end["ts"] >= event["ts"]
        for at in (event, end):  # both ends lie in an event of their track
            place = ("ts", "pid", "tid")
            assert any(e["ph"] == "X" and [e[key] for key in place] == [at[key] for key in place] for e in events)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"running", "waiting", "kv_pages_used"}
    (first, *_) = [event for event in events if event.get("cat") == "step"]
    assert first["args"] | {"step": 0, "rows": 356, "priced_rows": 512, "plan": "auto"} == first["args"]


def test_missing_and_shifted_ranks_are_named(tmp_path: Path) -> None:
    told = written(tmp_path, run_of(num_cut=5, clocks={2: 1.5}), name="t.json.gz")["otherData"]
    assert told["steps_not_traced"] == {"some model": 5} and told["moved"] == {"some model": {"2": "1.500000 s"}}
    assert "another clock" in told["clocks"] and told["model"] == "some model"
    told = written(tmp_path, run_of())["otherData"]
    assert "CLOCK_MONOTONIC" in told["clocks"] and not {"steps_not_traced", "moved"} & set(told)


def test_an_empty_trace_is_one(tmp_path: Path) -> None:
    assert written(tmp_path, TraceRun(name="x", steps=(), host=(), clocks={}))["traceEvents"]


def test_a_file_that_cannot_be_is_known_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        check_trace_file(str(tmp_path / "no" / "trace.json"))
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    check_trace_file(str(kept))
    assert kept.read_text() == "old"
    check_trace_file(str(tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()
