"""Replayed decode steps: tokens and probabilities are those of steps run op by op, and so are the errors."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import steps_lab as lab

from narrows.arch.weight_sharding import WeightSharding
from narrows.calibrate.step_work import StepWork, run_steps
from narrows.comm.captured import CapturedCollectives
from narrows.engine import capture
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.errors import RankError
from narrows.instruments.collective_clock import CollectiveClock
from narrows.instruments.trace_events import trace_events
from narrows.instruments.tracer import Tracer
from narrows.ops.compiled import kernels
from narrows.plan.named import applicable_layouts
from narrows.sched.sampling import SamplingParams

pytestmark = [
    pytest.mark.skipif(kernels() is None, reason="no compiled products with bf16 weights here"),
]

PROMPTS = [tuple(range(1, 8)), (9, 8, 7), (5, 6) * 12, (33,), (2, 4, 6)]
WAYS = [
    None,
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, logprobs=2),
    SamplingParams(repetition_penalty=1.3),
]


def config_for(folder: Path, **options: object) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype="bfloat16", max_context=96, kv_tokens=1024, prefix_cache=False, page_size=16, **options
    )


def texts(engine: Engine, sampling: SamplingParams | None) -> list[tuple[object, ...]]:
    """Requests of different lengths, so that rows leave and the batch takes every size."""
    requests = [engine.add(prompt, 8 + 9 * i, sampling=sampling) for i, prompt in enumerate(PROMPTS)]
    for _ in engine.run():
        pass
    return [(request.output, request.logprobs) for request in requests]


@pytest.mark.parametrize(
    ("kind", "dp", "tp", "ranks"),
    [
        ("v3", 1, 1, "threads"),
        ("v3", 1, 2, "processes"),
        pytest.param("v3", 2, 1, "processes", marks=pytest.mark.full),
        ("v3", 2, 2, "processes"),
        ("llama", 1, 1, "threads"),
        pytest.param("llama", 1, 2, "processes", marks=pytest.mark.full),
        pytest.param("llama", 2, 1, "processes", marks=pytest.mark.full),
        pytest.param("llama", 2, 2, "processes", marks=pytest.mark.full),
    ],
)
def test_a_replay_has_the_bits_of_op_by_op(tiny_model, kind: str, dp: int, tp: int, ranks: str) -> None:  # type: ignore[no-untyped-def]
    with Engine(resolve(config_for(tiny_model(kind), dp=dp, tp=tp, ranks=ranks))) as engine:
        engine.instrument(lab.NoCapture)
        wanted = [texts(engine, way) for way in WAYS]
        engine.instrument(lab.StepsSeen)
        for way, want in zip(WAYS, wanted, strict=True):
            assert texts(engine, way) == want
            assert texts(engine, way) == want  # now with the captures of the first time, and other pages
            replayed = [replayed for _, replayed in engine.readings()]
            assert min(replayed) > 10 * 20, "20 replayed steps and more"
        engine.instrument(None)
        assert texts(engine, None) == wanted[0]


@pytest.mark.parametrize(
    ("dp", "tp"), [(1, 2), (2, 2), *(pytest.param(*mesh, marks=pytest.mark.full) for mesh in ((2, 1), (1, 4)))]
)
def test_every_layout_is_captured_whole(tiny_model, dp: int, tp: int) -> None:  # type: ignore[no-untyped-def]
    resolved = resolve(config_for(tiny_model("v3"), dp=dp, tp=tp, ranks="processes"), WeightSharding())
    with Engine(resolved) as engine:
        engine.instrument(lab.StepsSeen)
        for layout in applicable_layouts(resolved.config, resolved.mesh):
            for rows in (1, 8):
                work = StepWork(rows=rows, phase="decode", context=20)
                batch = work.batch_for(engine)
                plan = work.plan(engine, layout, batch)
                run_steps(engine, batch, plan, 1)  # runs and is captured
                engine.readings()
                run_steps(engine, batch, plan, 3)
                assert engine.readings() == [(0, 3 * plan.num_ops)] * (dp * tp), f"{layout}, {rows} rows"


@pytest.fixture(scope="module")
def warm_engine(tiny_model) -> Iterator[Engine]:  # type: ignore[no-untyped-def]
    """An engine over two processes, for tests that put an instrument of their own into it."""
    with Engine(resolve(config_for(tiny_model("v3"), tp=2, ranks="processes", warmup_rows=2))) as engine:
        yield engine


def test_readers_see_every_step_once(warm_engine: Engine) -> None:
    engine, seen = warm_engine, []
    engine.instrument(lab.StepsSeen)
    for max_tokens in (1, 20, 40):
        engine.add(PROMPTS[0], max_tokens)
        for _ in engine.run():
            pass
        seen.append([made + replayed for made, replayed in engine.readings()])
    # One prefill; then decode steps, of which one more may have been on its way when the last token came.
    for prefill, short, long in zip(*seen, strict=True):
        of_one = (long - short) // 20
        assert prefill > 20 and long - short == 20 * of_one and short - prefill in (19 * of_one, 20 * of_one)


def test_old_captures_are_evicted_for_new_ones(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    with Engine(resolve(config_for(tiny_model("v3"), ranks="threads"))) as engine:
        wanted = texts(engine, None)
    monkeypatch.setattr(capture, "_MOST_STEPS", 2)
    with Engine(resolve(config_for(tiny_model("v3"), ranks="threads"))) as engine:
        for _ in range(3):
            assert texts(engine, None) == wanted
    monkeypatch.setattr(capture, "_ARENA_BYTES", 64)
    with Engine(resolve(config_for(tiny_model("v3"), ranks="threads"))) as engine:
        engine.instrument(lab.StepsSeen)
        assert texts(engine, None) == wanted
        assert [replayed for _, replayed in engine.readings()] == [0], "no step has room"


def test_captures_of_many_row_counts_stay(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """They share one arena, so that a batch of any size finds its capture again."""
    monkeypatch.setattr(capture, "_ARENA_BYTES", 50_000)  # a step of 40 rows takes 40 KB
    with Engine(resolve(config_for(tiny_model("v3"), ranks="threads"))) as engine:
        engine.instrument(lab.StepsSeen)
        steps = []
        for rows in range(1, 41):
            work = StepWork(rows=rows, phase="decode", context=10)
            batch = work.batch_for(engine)
            steps.append((batch, work.plan(engine, "auto", batch)))
            run_steps(engine, *steps[-1], 1)  # runs and is captured
        engine.readings()
        for _ in range(2):
            for batch, plan in steps:
                run_steps(engine, batch, plan, 1)
        assert engine.readings() == [(0, 2 * sum(plan.num_ops for _, plan in steps))]


def warm_up(engine: Engine) -> int:
    count = 0
    while (done := engine.warm_up_next()) is not None:
        done.result()
        count += 1
    return count


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.full)])
def test_warm_up_captures_steps_in_advance(tiny_model, dp: int, tp: int) -> None:  # type: ignore[no-untyped-def]
    """Texts are those without a warm-up, also if the engine warms up between them."""
    config = config_for(tiny_model("v3"), dp=dp, tp=tp, ranks="processes", warmup_rows=8)
    with Engine(resolve(config)) as engine:
        engine.instrument(lab.NoCapture)
        wanted = [texts(engine, way) for way in WAYS]
        engine.instrument(lab.StepsSeen)
        assert warm_up(engine) == 2 * 8, "plans are bound again, and no step is captured: 1 to 8 rows, drawn or not"
        assert warm_up(engine) == 0
        engine.readings()
        work = StepWork(rows=3 * dp, phase="decode", context=10)
        batch = work.batch_for(engine)
        plan = engine.plans.plan_for(batch)
        run_steps(engine, batch, plan, 1)
        assert engine.readings() == [(0, plan.num_ops)] * 2
        for way, want in zip(WAYS, wanted, strict=True):
            assert texts(engine, way) == want
            warm_up(engine)
        engine.instrument(None)
        assert warm_up(engine) == 0, "a reader comes and goes, and captures stay"
        engine.instrument(lab.NoCapture)
        engine.instrument(None)
        assert warm_up(engine) == 2 * 8, "plans are bound again, so that no capture is left"
        assert texts(engine, None) == wanted[0]


def test_collectives_of_a_warm_up_are_not_counted(warm_engine: Engine) -> None:
    engine = warm_engine
    engine.instrument(CollectiveClock)
    batch = StepWork(rows=2, phase="decode", context=10).batch_for(engine)
    plan = engine.plans.plan_for(batch)
    run_steps(engine, batch, plan, 1)
    of_one = _calls(engine)
    assert of_one > 0
    assert warm_up(engine) == 4, "one of them is captured already"
    assert _calls(engine) == 0
    run_steps(engine, batch, plan, 2)
    assert _calls(engine) == 2 * of_one


@pytest.mark.parametrize("tp", [1, 2])
def test_a_trace_has_replayed_steps(tiny_model, tp: int) -> None:  # type: ignore[no-untyped-def]
    """Each operation with its own times, and with the rows and bytes of the captured step."""
    with Engine(resolve(config_for(tiny_model("v3"), tp=tp, ranks="processes"))) as engine:
        engine.instrument(CollectiveClock)
        tracer = Tracer(engine, 8)
        engine.add(PROMPTS[0], 8)
        for _ in engine.run():
            pass
        run = tracer.run(tracer.end().result(), "one")
        counts = engine.readings()
    decode = [step for step in run.steps if step.phase == "decode"]
    assert len(decode) >= 6
    for rank in range(tp):
        first, *others = (step.executions[rank] for step in decode)
        assert not first.num_replayed and not run.steps[0].executions[rank].num_replayed
        for step, execution in zip(decode[1:], others, strict=True):
            assert execution.num_replayed == len(execution.starts) == step.plan.num_ops
            assert (list(execution.rows), list(execution.received)) == (list(first.rows), list(first.received))
            assert all(start <= end for start, end in zip(execution.starts, execution.ends, strict=True))
            assert all(end <= start for end, start in zip(execution.ends, execution.starts[1:], strict=False))
            assert step.submitted <= execution.starts[0] < execution.ends[-1] <= step.done
        traced = sum(sum(step.executions[rank].received) for step in run.steps)
        assert sum(counted.nbytes for counted in counts[rank].values()) >= traced > 0 or tp == 1
    ran = [event["args"]["ran"] for event in trace_events([run]) if event.get("cat") == "execution"]
    assert ran.count("op by op") == 2 * tp and ran.count("replayed") == len(ran) - 2 * tp > 0


def _calls(engine: Engine) -> int:
    return sum(counted.calls for counts in engine.readings() for counted in counts.values())


def test_ranks_may_have_different_captures(tiny_model) -> None:  # type: ignore[no-untyped-def]
    config = config_for(tiny_model("v3"), tp=2, ranks="processes", warmup_rows=2, timeout_s=5.0)
    with Engine(resolve(config)) as engine:
        wanted = texts(engine, None)
        engine.instrument(lab.LittleRoomOnRank1)
        engine.instrument(lab.StepsSeen, "seen")
        batch = StepWork(rows=2, phase="decode", context=10).batch_for(engine)
        run_steps(engine, batch, engine.plans.plan_for(batch), 1)  # only rank 0 has a capture now
        assert warm_up(engine) == 2 * 2
        assert texts(engine, None) == wanted
        (_, replayed), (_, never) = engine.readings("seen")
        assert replayed and not never


@pytest.mark.parametrize("limit", ["_MOST_STEPS", "_MOST_BYTES"])
def test_warm_up_replaces_no_capture(tiny_model, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(capture, limit, 3)
    monkeypatch.setattr(CapturedCollectives, "nbytes", 1)
    with Engine(resolve(config_for(tiny_model("v3"), ranks="threads"))) as engine:
        engine.instrument(lab.StepsSeen)
        batch = StepWork(rows=40, phase="decode", context=10).batch_for(engine)
        plan = engine.plans.plan_for(batch)
        run_steps(engine, batch, plan, 1)
        assert warm_up(engine) == 3, "two have room; the third has none, and the warm-up ends"
        engine.readings()
        run_steps(engine, batch, plan, 1)
        assert engine.readings() == [(0, plan.num_ops)]


def test_warm_up_ends_where_nothing_can_be_captured(tiny_model) -> None:  # type: ignore[no-untyped-def]
    config = config_for(tiny_model("v3"), tp=2, ranks="threads")
    with Engine(resolve(config)) as engine:
        assert warm_up(engine) == 1


def test_no_step_imports_anything(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """The first capture once imported torch's compiler, which takes longer than any step."""
    with Engine(resolve(config_for(tiny_model("v3"), tp=2, ranks="processes"))) as engine:
        engine.instrument(lab.Imported, "imported")
        before = engine.readings("imported")
        for way in WAYS:
            texts(engine, way)
        assert warm_up(engine)
        for known, modules in zip(before, engine.readings("imported"), strict=True):
            assert "torch" in known and not modules - known


def test_checked_ranks_and_float32_run_op_by_op(tiny_model) -> None:  # type: ignore[no-untyped-def]
    for config, options in (
        (config_for(tiny_model("v3"), tp=2, ranks="processes"), {"checked": True}),
        (config_for(tiny_model("v3"), ranks="threads"), {"dtype": "float32"}),
    ):
        with Engine(resolve(EngineConfig(**{**_fields(config), **options}))) as engine:
            engine.instrument(lab.StepsSeen)
            texts(engine, None)
            assert all(made and not replayed for made, replayed in engine.readings())


def _fields(config: EngineConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_a_death_during_replay_names_the_rank_and_the_collective(tiny_model) -> None:  # type: ignore[no-untyped-def]
    with (
        pytest.raises(RankError) as told,
        Engine(resolve(config_for(tiny_model("v3"), tp=2, ranks="processes"))) as engine,
    ):
        engine.add(PROMPTS[0], 80)
        for number, _ in enumerate(engine.run()):
            if number == 10:
                os.kill(engine.ranks.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
    text = str(told.value)
    assert text.startswith("rank 1 (pid ") and "was killed by signal 9 (SIGKILL)" in text
    assert re.search(
        r"rank 0 \(pid \d+ on .+\) was at #\d+ (all_reduce|all_reduce_norm|column_gather|all_gather) \"", text
    )
