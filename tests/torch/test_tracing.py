"""Traces of engines that run: every step of every rank, with bytes that crossed; instruments side by side; drift; plans
that are made ahead. Ranks are threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import eventually

from narrows.api import Generation, Update
from narrows.engine import step_record
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.step_record import StepRecord
from narrows.errors import ConfigError
from narrows.instruments.collective_clock import CollectiveClock, added
from narrows.instruments.op_times import BETWEEN, Expected, OpClock, op_times
from narrows.instruments.trace_file import TraceFile
from narrows.instruments.tracer import Tracer
from narrows.layout import MoveKind
from narrows.plan.cache import PlanKey
from narrows.plan.report.evidence import Evidence
from narrows.sched.batch import Batch, Chunk
from narrows.service import service as service_module
from narrows.service.service import EngineService
from narrows.service.step_times import DriftRule, StepTimes, predicted_collectives
from narrows.service.trace import ServiceTrace

TinyModel = Callable[..., Path]


@pytest.fixture
def engine(tiny_model: TinyModel) -> Iterator[Engine]:
    with Engine(config(tiny_model, tp=2)) as made:
        yield made


def config(tiny_model: TinyModel, **options: Any) -> Any:
    return resolve(EngineConfig(model=str(tiny_model("v3")), max_context=64, dtype="float32", **options))


def run_all(engine: Engine, prompts: int = 2, tokens: int = 4) -> None:
    for n in range(prompts):
        engine.add((n + 1, 2, 3), tokens)
    for _ in engine.run():
        pass


def test_a_trace_has_every_step_of_every_rank_and_fits_the_hosts_times(engine: Engine) -> None:
    tracer = Tracer(engine, 3)
    run_all(engine)
    run = tracer.run(tracer.end().result(), "one")
    assert [step.phase for step in run.steps] == ["prefill", "decode", "decode"] and run.num_cut > 0
    assert not run.clocks and run.num_ranks == 2
    for step in run.steps:
        for execution in step.executions:
            assert len(execution.starts) == len(execution.ends) == step.plan.num_ops
            assert step.submitted <= execution.starts[0] and execution.ends[-1] <= step.done
            assert all(start <= end for start, end in zip(execution.starts, execution.ends, strict=True))
            assert all(end <= start for end, start in zip(execution.ends, execution.starts[1:], strict=False))
            crosses = [s.move is not None and s.move.kind is not MoveKind.SLICE for _, s in step.plan.ops()]
            assert [bool(received) for received in execution.received] == crosses and any(crosses)
    assert run.steps[0].group_rows == (6,) and run.steps[0].executions[0].rows[0] in (3, 6)
    assert {span.name for span in run.host} == {"schedule", "plan", "hand out", "commit"}
    run_all(engine)  # nothing is around the steps any more


def test_ranks_keep_at_most_the_requested_steps(engine: Engine) -> None:
    tracer = Tracer(engine, 2)
    run_all(engine)
    assert tracer.done
    recorded = tracer.end().result()
    assert [len(kept.bounds) for kept in recorded] == [2, 2]
    assert all(kept.bounds[-1] == len(kept.starts) == len(kept.received) for kept in recorded)
    assert not recorded[0].execution(2).starts


def test_instruments_are_independent(engine: Engine) -> None:
    engine.instrument(CollectiveClock)
    engine.instrument(OpClock, "clock")
    tracer = Tracer(engine, 100)
    run_all(engine)
    run = tracer.run(tracer.end().result(), "one")
    counted = added(engine.readings(), {})
    clocked = op_times(engine.readings("clock"))
    crossed = sum(sum(execution.received) for step in run.steps for execution in step.executions)
    assert sum(each.nbytes for each in counted.values()) == crossed > 0
    num_steps = sum(step.plan.num_ops for step in run.steps)
    between = [row for row in clocked if row.price_class == BETWEEN]
    assert sum(row.calls for row in clocked if row not in between) == num_steps
    assert sum(row.calls for row in between) == num_steps - len(run.steps), "between each two of an execution"
    engine.instrument(None)
    run_all(engine)
    assert op_times(engine.readings("clock")), "it is still there"


def test_traces_name_the_running_plan_not_the_first_bound(engine: Engine) -> None:
    """Plans that run the same ops share one bound program; each op's prices are its own plan's."""
    tracer = Tracer(engine, 50)
    run_all(engine, prompts=1, tokens=3)
    run_all(engine, prompts=7, tokens=3)
    run = tracer.run(tracer.end().result(), "one")
    decode = [step for step in run.steps if step.phase == "decode"]
    assert {step.plan.shape.rows.total for step in decode} >= {1, 8}
    cache = engine.plans.current
    assert all(step.plan is cache.plan_of(PlanKey.of("decode", step.group_rows, step.logit_rows)) for step in decode)


def test_the_profile_has_the_predictions_of_the_plans_that_ran(engine: Engine) -> None:
    expected = Expected()
    engine.instrument(OpClock)
    engine.observe(expected.add)
    engine.add((1, 2, 3), 3)
    for _ in engine.run():
        pass
    rows = op_times(engine.readings(), expected)
    plans = engine.plans.current
    total = (
        plans.plan_of(PlanKey.of("prefill", (3,), 1)).seconds + 2 * plans.plan_of(PlanKey.of("decode", (1,), 1)).seconds
    )
    assert sum(row.predicted for row in rows) == pytest.approx(total, rel=1e-6)
    slices = [row for row in rows if not row.predicted]
    assert all(row.ratio is None for row in slices) and len(slices) < len(rows)


def test_time_between_ops_is_a_row_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = {"embed": (0.2, 0.0), "lm_head": (0.0, 0.02)}  # before and after a step: before the first is between none
    now, run = [0.0], StepRecord.run
    monkeypatch.setattr(step_record, "perf_counter", lambda: now[0])

    def late(record: StepRecord, number: int, *more: Any) -> None:
        before, after = pauses.get(record.ops[number].op.name, (0.0, 0.0))
        now[0] += before
        run(record, number, *more)
        now[0] += after

    monkeypatch.setattr(StepRecord, "run", late)
    engine.instrument(OpClock)
    engine.add((1, 2, 3), 1)
    for _ in engine.run():
        pass
    rows = op_times(engine.readings())
    assert [row.price_class for row in rows].index(BETWEEN) == len(rows) - 1
    assert rows[-1].seconds == pytest.approx(0.02)


def test_a_file_for_engines_one_after_the_other(tiny_model: TinyModel, tmp_path: Path) -> None:
    trace = TraceFile(file=str(tmp_path / "t.json"), num_steps=2)
    with Engine(config(tiny_model)) as one, Engine(config(tiny_model, tp=2)) as two:
        trace.start("one", one)
        trace.start("two", two)
        run_all(one)
        run_all(two)
        trace.collect()
    line = trace.write()
    assert line.startswith("trace: 4 steps, ") and "the 4 steps after them are not in it" in line
    document = json.loads((tmp_path / "t.json").read_text())
    names = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    assert names == {"one: host", "one: rank 0", "two: host", "two: rank 0", "two: rank 1"}
    with pytest.raises(ConfigError, match="--trace-steps is 0; it must be between 1 and"):
        TraceFile(file=str(tmp_path / "t.json"), num_steps=0)


# -- predicted beside measured -----------------------------------------------------------------------------------------


def batch_of(rows: int, phase: str = "decode") -> Batch:
    start = 1 if phase == "decode" else 0
    chunks = [Chunk(request=n, start=start, tokens=(1,), pages=(1,), num_logits=1) for n in range(rows if start else 1)]
    if not start:
        chunks = [Chunk(request=0, start=0, tokens=(1,) * rows, pages=(1, 2), num_logits=1)]
    return Batch(groups=(tuple(chunks),))


def test_a_bucket_off_its_prediction_is_logged_once(engine: Engine) -> None:
    times = StepTimes(DriftRule(factor=2.0, least_steps=3))
    slow, fast = batch_of(1), batch_of(2)
    now, lines = 0.0, []
    for _ in range(9):
        for batch, factor in ((slow, 3.0), (fast, 1.9)):
            plan = engine.plans.plan_for(batch)
            lines.append(
                times.ended(batch, plan, plan.seconds, [now - 1.0, now + factor * plan.seconds])
            )  # handed out long before
            now += factor * plan.seconds
    (line,) = filter(None, lines[2:])
    assert lines.index(line) == 4 and line.startswith("decode steps of up to 1 rows (1 sampled; auto) take ")
    assert "(3 times, median of the last 3)" in line and line.endswith("run narrows calibrate")
    found = times.documents()[id(engine.plans.plan_for(fast))]
    assert found["steps"] == 9 and found["measured_over_predicted"] == pytest.approx(1.9, rel=0.01)
    predicted, measured = times.classes["decode", 2, "auto"]
    assert measured == pytest.approx(1.9 * predicted, rel=0.01)
    with pytest.raises(ConfigError, match="--drift-factor is 1; it must be more than 1"):
        DriftRule(factor=1.0)


def test_predictions_of_prefill_are_in_proportion_to_rows(engine: Engine) -> None:
    times = StepTimes(DriftRule())
    batch = batch_of(17, "prefill")
    plan = engine.plans.plan_for(batch)
    assert plan.shape.rows.total == 24
    predicted = engine.plans.predicted_seconds(plan, batch)
    times.ended(batch, plan, predicted, [0.0, 1.0])
    assert times.classes["prefill", 24, "auto"].predicted == pytest.approx(plan.seconds * 17 / 24)
    collectives = predicted_collectives(plan)
    assert times.collectives == {kind: pytest.approx(s * 17 / 24) for kind, s in collectives.items()}
    moved = [s.ps * 1e-12 for _, s in plan.ops() if s.move is not None and s.move.kind is not MoveKind.SLICE]
    assert sum(collectives.values()) == pytest.approx(sum(moved)) and moved


# -- plans made ahead --------------------------------------------------------------------------------------------------


def test_plans_are_made_while_ranks_load_and_steps_find_them(tiny_model: TinyModel) -> None:
    with Engine(config(tiny_model, tp=2), warm_s=30.0) as engine:
        made = dict(engine.plans.items())
        assert PlanKey("decode", 256, 256, 256) in made and PlanKey("prefill", 2048, 2048, 1) in made
        assert engine.plans.plan_ahead() is None, "all that can be expected are made"
        before = engine.plans.values()
        engine.prepare(before)
        run_all(engine)
        assert engine.plans.values() == before
        said = "predictions for cpu-core rest on unmeasured prices: prefill of 2048 rows"
        assert engine.plans.evidence().startswith(said)
        assert Evidence.of(*before).unmeasured == 1.0
    with Engine(config(tiny_model)) as engine:
        assert not engine.plans.items(), "nothing is planned ahead unless it is requested"


# -- a service ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Callable[..., EngineService]]:
    made: list[EngineService] = []

    def start(file: str = "t.json", factor: float = 1.5, **options: Any) -> EngineService:
        trace = ServiceTrace(str(tmp_path / file) if file else "", 50)
        resolved = config(tiny_model, tp=2, **options)
        made.append(EngineService(resolved, max_queue=9, restart=False, drift=DriftRule(factor=factor), trace=trace))
        made[-1].start()
        return made[-1]

    yield start
    for service in made:
        service.close()


def ask(service: EngineService, tokens: int = 5) -> None:
    updates: list[Update] = []
    service.submit(Generation(prompt=(1, 2, 3), max_tokens=tokens), updates.append)
    eventually(lambda: bool(updates and updates[-1].finish_reason))


def test_a_service_traces_on_request(serve: Callable[..., EngineService], tmp_path: Path) -> None:
    service = serve()
    with pytest.raises(ConfigError, match="no trace is under way: POST /start_profile begins one"):
        service.stop_trace()
    ask(service)
    assert service.start_trace(100) == {"file": str(tmp_path / "t.json"), "steps": 100}
    with pytest.raises(ConfigError, match="a trace is already under way"):
        service.start_trace()
    ask(service)
    written = service.stop_trace()
    assert written["steps"] == 5
    document = json.loads((tmp_path / "t.json").read_text())
    assert len(document["traceEvents"]) == written["events"]
    assert sum(event.get("cat") == "step" for event in document["traceEvents"]) == 5
    service.start_trace(2)  # ends by itself
    ask(service)
    ask(service)
    assert service.stop_trace()["steps"] == 2
    with pytest.raises(ConfigError, match="no trace is under way"):
        service.stop_trace()
    service.start_trace()
    assert service.stop_trace()["steps"] == 0, "nothing ran"
    assert service.stats().collectives, "clocks of collectives stay"


def test_a_trace_under_way_is_written_at_the_end(serve: Callable[..., EngineService], tmp_path: Path) -> None:
    service = serve()
    service.start_trace()
    ask(service)
    assert service.drain(10) and json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_a_service_without_a_file_refuses(serve: Callable[..., EngineService]) -> None:
    service = serve(file="")
    for call in (service.start_trace, service.stop_trace):
        with pytest.raises(ConfigError, match="this server writes no traces: start it with --trace FILE"):
            call()


def test_a_service_has_predicted_beside_measured(
    serve: Callable[..., EngineService], caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(factor=1.0001)
    ask(service, tokens=50)
    stats, info = service.stats(), service.info()
    assert set(stats.plan_seconds) == set(stats.plans)
    assert all(predicted > 0 and measured > 0 for predicted, measured in stats.plan_seconds.values())
    assert stats.predicted_collectives and min(stats.predicted_collectives.values()) > 0
    ran = {(plan["for"]["phase"], plan["for"]["rows"]): plan for plan in info["plan_cache"] if plan["steps"]}
    assert set(ran) == {("prefill", 3), ("decode", 1)} and ran["decode", 1]["steps"] == 49
    assert ran["decode", 1]["measured_ms_median"] > 0 and not ran["decode", 1]["gives_logits"]
    assert info["price_evidence"] == service.evidence and info["drift_factor"] == 1.0001
    off = [record.getMessage() for record in caplog.records if "were predicted" in record.getMessage()]
    assert len(off) == 1 and off[0].startswith("decode steps of up to 1 rows"), off
    json.dumps(info)


def test_a_fixed_plan_is_not_compared_with_measurements(
    serve: Callable[..., EngineService], caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(factor=1.0001, batch_invariant=True)
    ask(service, tokens=50)
    assert not service.stats().plan_seconds and "were predicted" not in caplog.text


def test_an_idle_service_plans_ahead(serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_WARM_S", 0.0)
    service = serve()
    eventually(lambda: len(service.info()["plan_cache"]) >= 250)
    ask(service)
