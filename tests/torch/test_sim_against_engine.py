"""The simulation schedules as the engine does: same sharding and limits, and step for step the same rows and plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from narrows.cost.devices import device
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine, StepInFlight
from narrows.plan.planner import Deployment
from narrows.sched.batch import Batch
from narrows.sim.costs import StepCost
from narrows.sim.engine import simulate
from narrows.sim.serving import serving
from narrows.workload.arrivals import Ask, Prefixes, prompt_ids, random_lengths

TinyModel = Callable[..., Path]
Seen = tuple[str, tuple[int, ...], int, tuple[object, ...]]
"""A step's phase, rows by group, rows with logits, and its plan's ops."""


class Watched(Engine):
    """An engine that notes every step it hands out."""

    def push(self) -> StepInFlight | None:
        step = super().push()
        if step is not None:
            self.seen.append(
                (step.batch.phase, step.batch.group_rows, step.batch.num_logit_rows, step.plan.signature())
            )
        return step

    @property
    def seen(self) -> list[Seen]:
        return self.__dict__.setdefault("_seen", [])  # type: ignore[no-any-return]


def asks() -> list[Ask]:
    return random_lengths(12, 12, 40, spread=0.6, seed=5, prefixes=Prefixes(count=2, tokens=24))


@pytest.mark.parametrize(
    ("dp", "tp", "layout", "rows", "kv_tokens", "prefix_cache"),
    [
        (1, 1, "auto", 64, 512, True),
        (1, 2, "auto", 30, 112, True),  # pages run out
        (1, 2, "attn-tp-input-scattered", 2048, 512, False),
        (2, 1, "norm-before-gather", 48, 144, True),
        (2, 2, "auto", 17, 512, True),
    ],
)
def test_batches_and_plans_equal_the_engines(
    tiny_model: TinyModel, dp: int, tp: int, layout: str, rows: int, kv_tokens: int, prefix_cache: bool
) -> None:
    resolved = resolve(
        EngineConfig(
            model=str(tiny_model("v3")),
            dp=dp,
            tp=tp,
            layout=layout,
            dtype="float32",
            rows_per_step=rows,
            max_context=96,
            kv_tokens=kv_tokens,
            prefix_cache=prefix_cache,
        )
    )
    with Watched(resolved) as engine:
        for number, ask in enumerate(asks()):
            ids = prompt_ids(ask, number, vocab_size=resolved.config.vocab_size)
            engine.add(tuple(ids), ask.output_tokens)
        for _ in engine.run():
            pass
        stats = engine.scheduler.stats()

    deployment = Deployment(
        config=resolved.config, mesh=resolved.mesh, device=device("cpu-core"), dtype="fp32", graph=False
    )
    served = serving(
        deployment,
        layout,
        rows_per_step=rows,
        max_context=96,
        kv_tokens=kv_tokens,
        prefix_cache=prefix_cache,
    )
    assert (served.sharding, served.limits) == (resolved.sharding, resolved.limits)
    seen: list[Seen] = []

    def watch(batch: Batch, cost: StepCost) -> None:
        assert cost.plan is not None and cost.seconds > 0
        seen.append((batch.phase, batch.group_rows, batch.num_logit_rows, cost.plan.signature()))

    found = simulate(served.limits, served.costs(), asks(), watch=watch)
    assert seen == engine.seen
    assert found.stats == stats
    assert stats.steps == len(seen) > 14 and len({step[:3] for step in seen}) > 5
    if kv_tokens < 150:
        assert stats.preemptions > 0
    assert bool(stats.cached_prompt_tokens) == prefix_cache
