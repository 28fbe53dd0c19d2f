"""The engine as a service: many callers, aborts, a small cache, drains, refusals, and ranks that fail."""

from __future__ import annotations

import doctest
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S, eventually

from narrows.api import Draining, Generation, QueueFull, Unavailable, Update
from narrows.engine import warmup
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.worker import Worker
from narrows.errors import ConfigError
from narrows.plan.plan import Plan
from narrows.ranks.timing import TIMING, Timing
from narrows.sched.batch import Batch
from narrows.sched.sampling import GREEDY, SamplingParams
from narrows.sched.scheduler import Request, Scheduler
from narrows.service import collectives
from narrows.service.service import EngineService

TinyModel = Callable[..., Path]
BAD = 65
"""The token whose prompt makes a rank raise, in tests of failures."""


class Caller:
    """Keeps the updates of one generation."""

    def __init__(self, service: EngineService, generation: Generation) -> None:
        self.updates: list[Update] = []
        self.over = threading.Event()
        self.number = service.submit(generation, self.deliver)

    def deliver(self, update: Update) -> None:
        assert not self.over.is_set(), "something came after the last update"
        self.updates.append(update)
        if update.finish_reason:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.token_ids]

    def wait(self) -> Update:
        assert self.over.wait(PATIENCE_S), "it did not end"
        return self.updates[-1]


def generation_of(prompt: tuple[int, ...], max_tokens: int = 8, **fields: Any) -> Generation:
    return Generation(prompt=prompt, max_tokens=max_tokens, **({"sampling": GREEDY} | fields))


def resolved_of(folder: Path, **options: Any) -> Resolved:
    return resolve(EngineConfig(model=str(folder), dtype="float32", max_context=64, **options))


@pytest.fixture
def serve(tiny_model: TinyModel) -> Iterator[Callable[..., EngineService]]:
    made: list[EngineService] = []

    def start(*, max_queue: int = 1024, restart: bool = True, timing: Timing = TIMING, **options: Any) -> EngineService:
        resolved = resolved_of(tiny_model("v3"), **options)
        made.append(EngineService(resolved, max_queue=max_queue, restart=restart, timing=timing))
        made[-1].start()
        return made[-1]

    yield start
    for service in made:
        service.close()


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1)])
def test_texts_under_load_with_aborts_and_preemption_equal_each_alone(
    serve: Callable[..., EngineService], tiny_model: TinyModel, dp: int, tp: int
) -> None:
    source = random.Random(5)
    asks = [
        generation_of(tuple(source.choices(range(64), k=source.randint(1, 20))), source.randint(1, 30))
        for _ in range(64)
    ]
    with Engine(resolved_of(tiny_model("v3"), prefix_cache=False)) as engine:
        alone = [engine.add(each.prompt, each.max_tokens) for each in asks]
        for _ in engine.run():
            pass
    service = serve(dp=dp, tp=tp, page_size=4, kv_tokens=120, rows_per_step=32)
    unwanted = set(source.sample(range(64), 12))
    callers = []
    for index, each in enumerate(asks):
        callers.append(Caller(service, each))
        if index - 8 in unwanted:
            service.abort(callers[index - 8].number)
    for index, (caller, expected) in enumerate(zip(callers, alone, strict=True)):
        last = caller.wait()
        assert caller.tokens == expected.output[: len(caller.tokens)]
        if index not in unwanted:
            assert caller.tokens == expected.output and last.finish_reason == expected.finish_reason
        else:
            assert last.finish_reason in ("abort", expected.finish_reason)
    eventually(lambda: not service.stats().kv_pages_used and not service.stats().running)
    stats = service.stats()
    assert stats.preemptions > 0 and stats.waiting == 0 and stats.output_tokens >= 52 * 15 / 2
    assert sum(stats.plans.values()) == stats.steps
    assert service.health().ready


def test_updates_have_scores_once_and_log_probabilities_per_token(serve: Callable[..., EngineService]) -> None:
    service = serve(page_size=4)
    sampling = SamplingParams(prompt_logprobs=1, logprobs=2)
    caller = Caller(service, generation_of((1, 2, 3, 4, 5, 6, 7, 8, 9), 6, sampling=sampling))
    assert caller.wait().finish_reason == "length"
    assert [len(update.prompt_logprobs) for update in caller.updates] == [8, 0, 0, 0, 0, 0]
    assert all(len(update.token_ids) == len(update.logprobs) == 1 for update in caller.updates)
    scored = Caller(service, generation_of((1, 2, 3), 0, sampling=SamplingParams(prompt_logprobs=0)))
    assert scored.wait().finish_reason == "length" and not scored.tokens
    assert [len(update.prompt_logprobs) for update in scored.updates] == [2]
    again = Caller(service, generation_of((1, 2, 3, 4, 5, 6, 7, 8, 9), 2))
    again.wait()
    assert again.updates[0].num_cached_prompt == 8 and service.stats().cached_prompt_tokens == 8


def test_collectives_are_counted(serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_READ_S", 0.0)
    service = serve(tp=2, layout="all-reduce")
    Caller(service, generation_of((1, 2, 3), 4)).wait()
    eventually(lambda: sum(calls for calls, _, _ in service.stats().collectives.values()) == 4 * (2 * 3 + 2))
    calls, nbytes, seconds = service.stats().collectives["(-,P) -> (-,R)", "all_reduce"]
    # The embedding's sum and two per layer, over 3 + 1 + 1 + 1 rows of 32 floats; each rank gets half, twice.
    assert calls == 4 * 7 and nbytes == 2 * 7 * 32 * 4 * (3 + 1 + 1 + 1) and seconds > 0
    info = service.info()
    assert info["mesh"] == {"dp": 1, "tp": 2} and info["layout"] == "all-reduce"
    assert sum(entry["steps"] for entry in info["steps_run"]) == 4
    assert all(plan["price_sources"] and plan["moves"] for plan in info["plan_cache"])


def test_a_request_that_can_never_run_is_refused_at_once(serve: Callable[..., EngineService]) -> None:
    service = serve()
    for wrong, said in (
        (generation_of(()), "empty"),
        (generation_of((67,)), "outside the model's vocabulary"),
        (generation_of((1,) * 64), "context"),
        (generation_of((1,), priority=1000), "priority"),
    ):
        with pytest.raises(ConfigError, match=said):
            service.submit(wrong, lambda update: None)


def test_a_full_queue_refuses_with_a_retry_time(serve: Callable[..., EngineService]) -> None:
    service = serve(max_queue=3)
    held = threading.Event()
    first = threading.Event()

    def slow(update: Update) -> None:
        first.set()
        held.wait(PATIENCE_S)

    service.submit(generation_of((1, 2)), slow)  # the loop stands while its caller does
    assert first.wait(PATIENCE_S)
    callers = [Caller(service, generation_of((3,))) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 generations wait already, and --max-queue is 3") as refused:
        service.submit(generation_of((4,)), lambda update: None)
    assert refused.value.retry_after_s >= 1
    held.set()
    for caller in callers:
        assert caller.wait().finish_reason == "length"


def test_a_client_that_fills_the_queue_does_not_block_others(serve: Callable[..., EngineService]) -> None:
    service = serve(max_queue=6)
    held = threading.Event()
    first = threading.Event()

    def slow(update: Update) -> None:
        first.set()
        held.wait(PATIENCE_S)

    service.submit(generation_of((1, 2), client="flood"), slow)  # the loop stands while its caller does
    assert first.wait(PATIENCE_S)

    def fill(client: str) -> list[Caller]:
        callers: list[Caller] = []
        with pytest.raises(QueueFull, match="generations wait already, and --max-queue is 6"):
            while True:
                callers.append(Caller(service, generation_of((3,), client=client)))
        return callers

    flood, second, third = fill("flood"), fill("second"), fill("third")
    assert [len(each) for each in (flood, second, third)] == [6, 6 // 2, 6 // 3], "all, then even parts"
    assert fill("second") == [], "what is refused is its own excess"
    assert [len(fill(f"own {number}")) for number in range(4)] == [1, 1, 1, 0], "six clients: as many as may wait"
    held.set()
    for caller in flood + second + third:
        assert caller.wait().finish_reason == "length"


def test_a_caller_that_raises_does_not_stop_the_others(serve: Callable[..., EngineService]) -> None:
    service = serve()

    def broken(update: Update) -> None:
        raise RuntimeError("gone")

    service.submit(generation_of((1, 2), 4), broken)
    assert Caller(service, generation_of((3, 4), 4)).wait().finish_reason == "length"


def test_a_request_that_fails_on_admission_ends_alone(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    add = Scheduler.add

    def odd(scheduler: Scheduler, request: Request) -> None:
        if request.prompt[0] == BAD:
            raise ZeroDivisionError("how odd")
        add(scheduler, request)

    monkeypatch.setattr(Scheduler, "add", odd)
    bad, good = Caller(service, generation_of((BAD,))), Caller(service, generation_of((5,)))
    assert bad.wait().finish_reason == "error" and "how odd" in bad.wait().error
    assert good.wait().finish_reason == "length"
    assert service.health().ready and not service.health().num_restarts
    assert service.drain(10), "it is not waited for"


def test_a_drain_finishes_running_requests_and_refuses_new_ones(serve: Callable[..., EngineService]) -> None:
    service = serve(tp=2)
    caller = Caller(service, generation_of((1, 2), 40))
    assert service.drain(20) and caller.wait().finish_reason == "length"
    with pytest.raises(Draining):
        service.submit(generation_of((1,)), lambda update: None)
    service.close()
    assert not service.health().ready


def test_a_close_ends_waiting_requests_with_an_error(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Worker.step
    monkeypatch.setattr(Worker, "step", lambda self, *args: time.sleep(0.05) or real(self, *args))
    service = serve()
    caller = Caller(service, generation_of((1, 2), 60))
    assert not service.drain(0.1)
    service.close()
    assert caller.wait().finish_reason == "abort" and "ended" in caller.updates[-1].error
    service.close()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Worker.step

    def step(self: Worker, batch: Any, *args: Any) -> Any:
        tokens = {token for group in batch.groups for chunk in group for token in chunk.tokens}
        if BAD in tokens and self.comm.rank == self.comm.mesh.size - 1:
            raise RuntimeError("bad luck")
        return real(self, batch, *args)

    monkeypatch.setattr(Worker, "step", step)


@pytest.mark.usefixtures("failing")
def test_failed_ranks_restart_once_and_waiting_requests_run(
    serve: Callable[..., EngineService], caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(tp=2, page_size=4, kv_tokens=16, rows_per_step=4)
    expected = Caller(service, generation_of((1, 2), 6))
    expected.wait()
    steps = service.stats().steps
    held = threading.Event()
    blocker = service.submit(generation_of((5,), 2), lambda update: held.wait(PATIENCE_S) and None)
    bad = Caller(service, generation_of((1, BAD), 14))  # takes the whole cache
    waits = Caller(service, generation_of((1, 2), 6))
    held.set()
    assert bad.wait().finish_reason == "error" and "bad luck" in bad.updates[-1].error and blocker >= 0
    assert waits.wait().finish_reason == "length" and waits.tokens == expected.tokens
    assert service.health().ready and service.health().num_restarts == 1 and not service.failure
    assert service.stats().steps > steps and service.stats().restarts == 1, "totals go on over a restart"
    assert "started again" in caplog.text and "bad luck" in caplog.text
    again = Caller(service, generation_of((BAD,), 6))
    assert again.wait().finish_reason == "error"
    eventually(lambda: bool(service.failure))
    assert "bad luck" in service.failure and not service.health().ready and service.health().num_restarts == 1
    with pytest.raises((Unavailable, Draining)):
        service.submit(generation_of((1,)), lambda update: None)


@pytest.mark.usefixtures("failing")
def test_without_restart_a_failure_ends_everything(serve: Callable[..., EngineService]) -> None:
    service = serve(restart=False, page_size=4, kv_tokens=16)
    callers = [Caller(service, generation_of((BAD,), 14)), Caller(service, generation_of((1, 2), 6))]
    for caller in callers:
        assert caller.wait().finish_reason == "error"
    eventually(lambda: "bad luck" in service.failure)
    assert not service.health().ready and service.drain(1)


def test_health_reports_a_step_that_does_not_end(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = Worker.step, threading.Event()
    service = serve(timeout_s=0.3, timing=Timing(slow_factor=0.0, slow_s=0.2, first_s=0.0))
    assert service.health().ready
    monkeypatch.setattr(Worker, "step", lambda self, *args: held.wait(PATIENCE_S) and real(self, *args))
    caller = Caller(service, generation_of((1, 2), 6))
    eventually(lambda: "a step has not ended" in service.health().detail)
    eventually(lambda: caller.over.is_set())
    held.set()
    assert caller.wait().finish_reason == "error" and "has not ended" in caller.updates[-1].error
    eventually(lambda: service.health().ready)
    assert service.health().num_restarts == 1


def test_doctests() -> None:
    result = doctest.testmod(warmup)
    assert result.attempted and not result.failed


def test_an_idle_service_warms_up_and_serves_in_between(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    dummies: list[int] = []
    may_go_on = threading.Event()

    def warm_up(worker: Worker, batch: Batch, plan: Plan) -> bool:
        dummies.append(batch.num_rows)
        assert len(dummies) != 5 or may_go_on.wait(PATIENCE_S)
        return True

    monkeypatch.setattr(Worker, "warm_up", warm_up)
    service = serve(warmup_rows=6)
    eventually(lambda: len(dummies) == 5)
    caller = Caller(service, generation_of((1, 2, 3)))
    may_go_on.set()
    assert caller.wait().finish_reason == "length"
    eventually(lambda: len(dummies) == 12)
    assert dummies == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], "greedy and drawn, each once"
    assert Caller(service, generation_of((1, 2, 3))).wait().finish_reason == "length"
    assert len(dummies) == 12
    assert service.stats().steps == sum(service.stats().plans.values()), "warm-up steps are not counted"


def test_a_failure_in_a_warm_up_is_reported(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm_up(worker: Worker, batch: Batch, plan: Plan) -> bool:
        if batch.num_rows == 3:
            raise RuntimeError("no memory")
        return True

    monkeypatch.setattr(Worker, "warm_up", warm_up)
    service = serve(restart=False)
    eventually(lambda: not service.health().ready)
    assert "no memory" in service.health().detail


def test_an_abort_frees_pages_within_one_step(
    serve: Callable[..., EngineService], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps, go_on = Worker.step, [], threading.Event()

    def step(self: Worker, *args: Any) -> Any:
        steps.append(None)
        assert len(steps) != 2 or go_on.wait(PATIENCE_S)
        return real(self, *args)

    monkeypatch.setattr(Worker, "step", step)
    service = serve()
    caller = Caller(service, generation_of((1, 2), 60))
    eventually(lambda: len(steps) == 2 and service.stats().kv_pages_used > 0)
    service.abort(caller.number)
    go_on.set()
    assert caller.wait().finish_reason == "abort"
    eventually(lambda: not service.stats().kv_pages_used)
    assert len(steps) <= 3 and len(caller.tokens) <= 2


def test_a_step_may_take_longer_the_longer_its_texts_are(tiny_model: TinyModel) -> None:
    resolved = resolve(EngineConfig(model=str(tiny_model("v3")), dtype="float32", max_context=2000))
    with Engine(resolved) as engine:
        engine.add((1,) * 1900, 1)
        step = engine.push()
        assert step is not None and step.plan.shape.context == 1024
        assert step.expected_s == pytest.approx(step.plan.seconds * 1900 / 1024)
        engine.take()
        engine.add((1, 2), 1)
        step = engine.push()
        assert step is not None and step.expected_s == step.plan.seconds
        engine.take()
