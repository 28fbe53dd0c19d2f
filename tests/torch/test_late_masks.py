"""Late masks through engine and service: other texts continue; the late one continues, ends, or is aborted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from narrows.api import Generation, Update
from narrows.engine import core
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.worker import Worker
from narrows.sched.guide import Guide
from narrows.sched.sampling import GREEDY
from narrows.sched.scheduler import Request
from narrows.service.service import EngineService

TinyModel = Callable[..., Path]
EVEN, NOTHING = b"\x55" * 9, b"\x00" * 9
BAD = 65
"""The token whose prompt makes a rank raise."""


class Held(Guide):
    """The first mask is ready; each later one is made on a thread, when ``gate`` is open."""

    def __init__(self, *, open_: bool = False, masks: int = 100) -> None:
        self.gate = threading.Event()
        self.left = masks
        self.num_taken = 0
        self.has_ended = threading.Event()
        self._mask = EVEN
        self._there = True
        self._call: Callable[[], None] | None = None
        if open_:
            self.gate.set()

    def allowed(self) -> bytes:
        assert self._there
        return self._mask

    def advance(self, token: int) -> None:
        assert token % 2 == 0
        self.num_taken += 1
        self._call, self._there = None, False
        threading.Thread(target=self._make, daemon=True).start()

    @property
    def ready(self) -> bool:
        return self._there

    def when_ready(self, call: Callable[[], None]) -> None:
        self._call = call
        if self._there:
            call()

    def end(self) -> None:
        self.has_ended.set()

    def _make(self) -> None:
        assert self.gate.wait(PATIENCE_S)
        self.left -= 1
        self._mask = EVEN if self.left else NOTHING
        self._there = True
        if (call := self._call) is not None:
            call()


class Caller:
    def __init__(
        self, service: EngineService, prompt: tuple[int, ...], max_tokens: int, guide: Guide | None = None
    ) -> None:
        self.tokens: list[int] = []
        self.reason = ""
        self.over = threading.Event()
        self.first = threading.Event()
        generation = Generation(prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, guide=guide)
        self.number = service.submit(generation, self._take)

    def _take(self, update: Update) -> None:
        self.tokens += update.token_ids
        self.reason = update.finish_reason
        self.first.set()
        if update.finish_reason:
            self.over.set()

    def wait(self) -> str:
        assert self.over.wait(PATIENCE_S), "it did not end"
        return self.reason


@pytest.fixture
def service(tiny_model: TinyModel) -> Iterator[EngineService]:
    options: dict[str, Any] = {"dtype": "float32", "max_context": 64, "page_size": 4}
    made = EngineService(resolve(EngineConfig(model=str(tiny_model("llama")), **options)), max_queue=64, restart=True)
    made.start()
    yield made
    made.close()


def test_a_late_mask_delays_only_its_own_text(service: EngineService) -> None:
    guide = Held()
    late = Caller(service, (1, 2, 3), 6, guide)
    assert late.first.wait(PATIENCE_S)
    others = [Caller(service, (5, number), 40) for number in range(3)]
    assert [other.wait() for other in others] == ["length"] * 3
    assert len(late.tokens) == 1 and not late.over.is_set()
    guide.gate.set()
    assert late.wait() == "length" and len(late.tokens) == 6 and guide.num_taken == 5


def test_masks_from_threads_give_the_same_text(service: EngineService, tiny_model: TinyModel) -> None:
    class Even(Guide):
        def allowed(self) -> bytes:
            return EVEN

        def advance(self, token: int) -> None:
            assert token % 2 == 0

    expected = Caller(service, (1, 2, 3), 12, Even())
    expected.wait()
    threaded = Caller(service, (1, 2, 3), 12, Held(open_=True))
    assert threaded.wait() == "length" and threaded.tokens == expected.tokens
    config = EngineConfig(model=str(tiny_model("llama")), dtype="float32", max_context=64)
    with Engine(resolve(config)) as engine:  # without a service no thread needs a wake-up
        guide = Held()
        alone = engine.add((1, 2, 3), 12, sampling=GREEDY, guide=guide)
        opens = threading.Timer(0.1, guide.gate.set)
        opens.start()
        for _ in engine.run():
            engine.scheduler.check_integrity()
        opens.join()
    assert alone.output == expected.tokens


def test_a_late_mask_that_allows_nothing_ends_the_text(service: EngineService) -> None:
    guide = Held(masks=1)
    late = Caller(service, (1, 2, 3), 6, guide)
    assert late.first.wait(PATIENCE_S) and not late.over.is_set()
    guide.gate.set()
    assert late.wait() == "stop" and len(late.tokens) == 1 and guide.has_ended.wait(PATIENCE_S)


def test_an_abort_while_the_mask_is_late_frees_its_pages(service: EngineService) -> None:
    guide = Held()
    late = Caller(service, (1, 2, 3), 6, guide)
    assert late.first.wait(PATIENCE_S)
    service.abort(late.number)
    assert late.wait() == "abort" and guide.has_ended.wait(PATIENCE_S)
    assert Caller(service, (5, 6), 3).wait() == "length"
    assert service.stats().kv_pages_used == 0 and service.stats().running == 0
    guide.gate.set()


def test_a_drain_waits_for_late_masks(service: EngineService) -> None:
    guide = Held()
    late = Caller(service, (1, 2, 3), 6, guide)
    assert late.first.wait(PATIENCE_S)
    assert not service.drain(0.05)
    guide.gate.set()
    assert service.drain(60) and late.wait() == "length" and len(late.tokens) == 6


def test_a_failure_with_a_late_mask_ends_its_text_and_waiting_ones_run(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Worker.step

    def step(worker: Worker, batch: Any, *args: Any) -> Any:
        if any(BAD in chunk.tokens for group in batch.groups for chunk in group):
            raise RuntimeError("bad luck")
        return real(worker, batch, *args)

    monkeypatch.setattr(Worker, "step", step)
    guide = Held()
    late = Caller(service, (1, 2, 3), 6, guide)
    assert late.first.wait(PATIENCE_S)
    assert Caller(service, (1, BAD), 6).wait() == "error"
    assert late.wait() == "error" and guide.has_ended.wait(PATIENCE_S)
    after = Held(open_=True)
    while not service.health().ready:
        time.sleep(0.01)
    again = Caller(service, (1, 2, 3), 6, after)
    assert again.wait() == "length" and after.num_taken == 5
    guide.gate.set()  # its mask is delivered to no request
    assert Caller(service, (5, 6), 3).wait() == "length"


def test_a_step_waits_a_bounded_time_for_any_number_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Guide):
        def __init__(self) -> None:
            self.waited = 0.0

        def wait(self, timeout_s: float) -> bool:
            self.waited = timeout_s
            return False

        def allowed(self) -> bytes:
            return EVEN

        def advance(self, token: int) -> None: ...

    monkeypatch.setattr(core, "perf_counter", lambda: 100.0)
    for count, seconds in ((10, 0.004), (1000, 0.02)):
        guides = [Never() for _ in range(count)]
        requests = [Request(id=number, prompt=(1,), max_tokens=1, guide=guide) for number, guide in enumerate(guides)]
        Engine._hold_for_masks(None, requests)  # type: ignore[arg-type]
        assert [guide.waited for guide in guides] == [pytest.approx(seconds)] * count
