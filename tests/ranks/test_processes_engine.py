"""The engine over rank processes: the tokens and the logits of rank threads, bit for bit, under every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.llm import LLM
from narrows.engine.script import Script
from narrows.errors import CheckpointError, ConfigError
from narrows.plan.named import applicable_layouts, named_layout

pytestmark = pytest.mark.timeout(100)

PROMPTS = [tuple(range(1, 8)), (9, 8, 7), (5, 6) * 12, (33,)]


def generated(engine: Engine) -> list[list[int]]:
    requests = [engine.add(prompt, 12) for prompt in PROMPTS]
    for _ in engine.run():
        pass
    return [request.output for request in requests]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2)])
def test_processes_give_the_bits_of_threads_under_every_layout(speaking_v3: Path, dp: int, tp: int) -> None:
    script = Script(PROMPTS, num_groups=dp, num_steps=3, page_size=16)
    asked = EngineConfig(
        model=str(speaking_v3),
        dp=dp,
        tp=tp,
        rows_per_step=16,  # less than the prompts: steps that mix prefill and decode
        max_context=script.max_context + 12,
        kv_tokens=2 * script.kv_tokens,
        checked=dp == 1,
        want_logits=True,
    )
    one = resolve(asked)
    layouts = applicable_layouts(one.config, one.mesh)
    forms = next(rules.forms for name in layouts if (rules := named_layout(name, one.config, one.mesh)).forms)
    compared = 0
    with (
        Engine(resolve(asked, forms)) as threads,
        Engine(resolve(replace(asked, ranks="processes"), forms)) as processes,
    ):
        for step, batch in enumerate(script):
            wanted = None
            for layout in layouts:
                plan = threads.book_of(layout).plan_for(batch.phase, batch.group_rows, batch.num_logit_rows)
                wanted, got = threads.run_plan(batch, plan), processes.run_plan(batch, plan)
                for rank, (theirs, mine) in enumerate(zip(wanted, got, strict=True)):
                    assert mine.ids == theirs.ids, (step, layout, rank)
                    assert mine.logits is not None and theirs.logits is not None
                    assert torch.equal(mine.logits, theirs.logits), (step, layout, rank)
                    compared += mine.logits.numel()
            assert wanted is not None
            script.sampled(batch, wanted[0].ids)
        assert generated(processes) == generated(threads)
    assert compared > 10_000 and len(layouts) > 2


def test_weights_are_read_in_the_ranks_and_their_error_is_the_callers(speaking_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((speaking_v3 / "config.json").read_text())))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(tmp_path, tp=2, ranks="processes")


def test_what_needs_shared_memory_is_refused(speaking_v3: Path) -> None:
    with pytest.raises(ConfigError, match="--ranks threads"):
        Engine(resolve(EngineConfig(model=str(speaking_v3), tp=2, ranks="processes")), wrap=lambda worker: None)


def test_a_config_that_cannot_be_is_refused(speaking_v3: Path) -> None:
    for options, text in (
        ({"ranks": "fibers"}, "'fibers' is not known; ranks are threads or processes"),
        ({"timeout_s": 0.0}, "it must be more than 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            resolve(EngineConfig(model=str(speaking_v3), **options))
