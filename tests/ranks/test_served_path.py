"""Decode steps as a server runs them: replays are the op-by-op run to the bit, and a fault in a capture is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import steps_lab as lab

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.evaluate.batches import forced_steps
from narrows.evaluate.divergence import Baseline, measure, run_rows
from narrows.evaluate.evaluation import LayoutResult, Measured
from narrows.evaluate.served import served_line, verify_served
from narrows.ops.compiled import kernels

PROMPTS = [list(range(1, 24)), [9, 8, 7, 6], [5, 6] * 12, [33]]

captures = pytest.mark.skipif(kernels() is None, reason="no compiled products with bf16 weights here")


def config_for(tiny_model: Any, kind: str = "v3", **options: Any) -> EngineConfig:
    return EngineConfig(model=str(tiny_model(kind)), **{"dtype": "bfloat16", "tp": 2, "page_size": 16} | options)


@captures
@pytest.mark.parametrize(("kind", "dp", "tp"), [("v3", 1, 1), ("v3", 2, 1), ("llama", 1, 2)])
def test_replays_of_every_layout_are_the_op_by_op_run(tiny_model: Any, kind: str, dp: int, tp: int) -> None:
    report = verify_served(config_for(tiny_model, kind, dp=dp, tp=tp), PROMPTS, num_decode=4)
    num = 3 * len(report.paths)
    assert report.ok and all(path.num_decode == path.num_replayed == 3 for path in report.paths.values())
    said = f"captured (bfloat16): {num} of {num} decode steps replayed, ids and logits bit for bit those of op by op"
    assert str(report) == f"served path: {said}"


FAULTS = pytest.mark.parametrize(
    ("plant", "rank", "cause"),
    [
        (lab.StaleLengths, 1, "a stale length: row 0 reads 2 tokens and not 25"),
        (lab.WrongSlots, 1, "a wrong slot: row 0 writes slot "),
        (lab.LeftOutCollective, 0, "a collective left out: all_reduce"),  # fused with the norm on some machines
    ],
)


@captures
@FAULTS
def test_a_fault_in_a_capture_is_named(tiny_model: Any, plant: Any, rank: int, cause: str) -> None:
    report = verify_served(config_for(tiny_model), PROMPTS, num_decode=4, layouts=["all-reduce"], plant=plant)
    (fault,) = report.faults.values()
    assert not report.ok and (fault.step, fault.rank, fault.num_rows) == (3, rank, 4)
    assert 0 in fault.rows and fault.cause.startswith(cause)
    text = str(fault)
    assert text.startswith(f"step 3, rank {rank}: the replay is not the op-by-op run: row")
    assert " where op by op gives " in text and text.endswith(fault.cause)
    assert str(report) == "served path: captured (bfloat16): 3 of 3 decode steps replayed"


def test_the_report_says_why_no_step_is_captured(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify_served(config_for(tiny_model, dtype="float32"), PROMPTS, layouts=["auto"])
    assert report.ok and str(report) == "served path: op by op: no compiled code for float32 here"
    monkeypatch.setattr("narrows.engine.capture.kernels", lambda: None)
    report = verify_served(config_for(tiny_model), PROMPTS, layouts=["auto"])
    assert report.ok and str(report) == "served path: op by op: no compiled code here"


@captures
@FAULTS
def test_distributions_are_of_replays_and_name_a_fault_in_one(
    tiny_model: Any, plant: Any, rank: int, cause: str
) -> None:
    texts = [tuple(range(1, 33)), tuple(range(60, 30, -1))]
    one = config_for(tiny_model, tp=1, max_context=64, kv_tokens=512, prefix_cache=False)
    many = resolve(replace(one, tp=2, ranks="processes", layout="all-reduce"))
    steps = list(forced_steps(texts, many.limits, alone=False))
    with Engine(resolve(one)) as engine:
        baseline = Baseline(steps=steps, logits=list(run_rows(engine, steps)), exact=None, dtype=many.dtype)
    with Engine(many) as engine:
        well = measure(engine, baseline)
        engine.instrument(plant, "plant")
        ill = measure(engine, baseline)
    num = sum(step.batch.phase == "decode" for step in steps)
    assert well.served.fault is None and well.served.num_replayed == well.served.num_decode == num > 3
    assert served_line("bfloat16", [well.served]).startswith(f"served path: captured (bfloat16): {num} of {num} decode")
    fault = ill.served.fault
    assert fault is not None and fault.rank == rank and fault.cause.startswith(cause[:12])
    assert 0 in fault.rows or plant is lab.WrongSlots, "there the cache still holds what the sound run has written"
    found = Measured(dtype="bfloat16", alone=False, distance=ill)
    failures = LayoutResult(layout="all-reduce", scores=(), distances=(found,), quantization="int8").failures
    assert failures == (f"distributions in bfloat16, batched: {fault}",), "bits are the same whatever is rounded"
