"""The engine over rank processes: the tokens and the logits of rank threads, bit for bit, under every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrows.arch.weight_sharding import WeightSharding
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.llm import LLM
from narrows.errors import CheckpointError, ConfigError
from narrows.evaluate.verify_batches import VerifyBatches
from narrows.native import why_absent
from narrows.plan.named import applicable_layouts, named_layout
from narrows.sched.batch import Batch

PROMPTS = [tuple(range(1, 8)), (9, 8, 7), (5, 6) * 12, (33,)]


def generated(engine: Engine) -> list[list[int]]:
    requests = [engine.add(prompt, 12) for prompt in PROMPTS]
    for _ in engine.run():
        pass
    return [request.output for request in requests]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.full), (2, 2)])
def test_every_layout_has_the_bits_of_threads(speaking_v3: Path, dp: int, tp: int) -> None:
    script = VerifyBatches(PROMPTS, num_groups=dp, num_steps=3, page_size=16)
    engine_config = EngineConfig(
        model=str(speaking_v3),
        dp=dp,
        tp=tp,
        rows_per_step=16,  # less than the prompts: steps that mix prefill and decode
        max_context=script.max_context + 12,
        kv_tokens=2 * script.kv_tokens,
        checked=dp == 1,
        want_logits=True,
    )
    one = resolve(engine_config)
    layouts = applicable_layouts(one.config, one.mesh)
    sharding = next(rules.sharding for name in layouts if (rules := named_layout(name, one.config, one.mesh)).sharding)
    compared = 0
    with (
        Engine(resolve(engine_config, sharding)) as threads,
        Engine(resolve(replace(engine_config, ranks="processes"), sharding)) as processes,
    ):
        for step, batch in enumerate(script):
            wanted = None
            for layout in layouts:
                plan = threads.plans.cache_of(layout).plan_for(batch)
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


@pytest.mark.parametrize(("encode_rows", "way"), [("int8-always", "shared memory"), ("fp8-always", "gloo")])
def test_encoded_rows_have_the_bits_of_threads(
    speaking_v3: Path, encode_rows: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and scales as bytes of one exchange, among uneven rows: groups of 14 and 1, ranks without any."""
    if way == "shared memory" and why_absent():
        pytest.skip(f"no compiled code: {why_absent()}")
    script = VerifyBatches([PROMPTS[0] * 2, PROMPTS[1][:1]], num_groups=2, num_steps=2, page_size=16)
    engine_config = EngineConfig(
        model=str(speaking_v3),
        dp=2,
        tp=2,
        max_context=script.max_context,
        kv_tokens=script.kv_tokens,
        checked=True,
        want_logits=True,
        encode_rows=encode_rows,
    )
    layouts = ("attn-tp-input-scattered", "sequence-parallel")
    with Engine(resolve(engine_config, WeightSharding())) as threads:
        steps = [
            (batch, threads.plans.cache_of(layout).plan_for(batch))
            for batch in script_batches(script, threads)
            for layout in layouts
        ]
        assert all(plan.encodings for _, plan in steps)
        wanted = [threads.run_plan(batch, plan) for batch, plan in steps]
    monkeypatch.setenv("NARROWS_NATIVE", "0" if way == "gloo" else "1")  # the ranks inherit it
    with Engine(resolve(replace(engine_config, ranks="processes"), WeightSharding())) as processes:
        assert processes.ranks.transport.startswith(way)
        for (batch, plan), theirs in zip(steps, wanted, strict=True):
            for mine, its in zip(processes.run_plan(batch, plan), theirs, strict=True):
                assert mine.logits is not None and its.logits is not None
                if way == "gloo":  # those ranks have no compiled code, and their stages round otherwise
                    torch.testing.assert_close(mine.logits, its.logits, rtol=0.05, atol=0.05)
                else:
                    assert torch.equal(mine.logits, its.logits)


def script_batches(script: VerifyBatches, engine: Engine) -> list[Batch]:
    """The batches of `verify`, fed with the engine's samples."""
    batches = []
    for batch in script:
        plan = engine.plans.current.plan_for(batch)
        script.sampled(batch, engine.run_plan(batch, plan)[0].ids)
        batches.append(batch)
    return batches


def test_errors_of_loading_reach_the_caller(speaking_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((speaking_v3 / "config.json").read_text())))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(tmp_path, tp=2, ranks="processes")


def test_options_that_need_shared_memory_are_refused(speaking_v3: Path) -> None:
    with pytest.raises(ConfigError, match="--ranks threads"):
        Engine(resolve(EngineConfig(model=str(speaking_v3), tp=2, ranks="processes")), wrap=lambda worker: None)


def test_a_wrong_config_is_refused(speaking_v3: Path) -> None:
    for options, text in (
        ({"ranks": "fibers"}, "'fibers' is not known; ranks are threads or processes"),
        ({"timeout_s": 0.0}, "it must be more than 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            resolve(EngineConfig(model=str(speaking_v3), **options))
