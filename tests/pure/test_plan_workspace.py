"""Workspace of a step: it grows with rows, with rows x context where kernels need it, and is per rank."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from narrows.arch.config import GQA, ModelConfig
from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cli.main import main
from narrows.cost import device
from narrows.cost.memory import GPU_COLLECTIVES, GPU_PROCESS
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh, split_evenly
from narrows.plan.planner import Deployment, Planner
from narrows.plan.workspace import FUSED_VALUES, MASK_BYTES, POOL, Kernels, Workspace, workspace


def planner(
    of: str | ModelConfig = "deepseek-v3", on: str = "h200", dtype: str = "fp8", dp: int = 1, tp: int = 8
) -> Planner:
    config = preset(of) if isinstance(of, str) else of
    deployment = Deployment(config=config, mesh=Mesh.of(dp=dp, tp=tp), device=device(on), dtype=dtype)
    return Planner(deployment, WeightSharding())


def of(by: Planner, rows: int, context: int = 4096, layout: str = "all-reduce", phase: str = "prefill") -> Workspace:
    mesh = by.deployment.mesh
    return by.workspace(
        by.plan(StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase=phase, context=context), layout)
    )


def test_usable_memory_falls_with_rows() -> None:
    """sglang #35201: a reserve that is the same at 2048 and at 32768 rows ends in an out-of-memory."""
    by = planner()
    uses = [
        by.memory(by.plan(StepShape.of(by.deployment.mesh, (rows,), phase="prefill", context=131072), "auto"))
        for rows in (2048, 8192, 32768)
    ]
    usable = [use.usable for use in uses]
    assert usable == sorted(usable, reverse=True) and usable[0] - usable[-1] > 5e9
    assert [use.context_tokens for use in uses] == sorted((use.context_tokens for use in uses), reverse=True)
    assert usable[0] == uses[0].device - GPU_PROCESS - GPU_COLLECTIVES - uses[0].workspace


@pytest.mark.slow
def test_the_command_prints_the_workspace(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for rows in (2048, 32768):
        line = f"plan deepseek-v3 --device h200 --tp 8 --rows {rows} --context 131072 --layout auto --json"
        assert main(line.split()) == 0
        (entry,) = json.loads(capsys.readouterr().out)["layouts"]
        found[rows] = entry["memory"]
    assert found[32768]["usable_gb"] < found[2048]["usable_gb"] - 5
    parts = found[32768]["workspace_gb"]
    assert sum(parts[name] for name in ("activations", "kept", "collectives", "logits")) == pytest.approx(
        parts["total"]
    )


def test_activations_are_rows_times_widths() -> None:
    """By hand, for a Llama on one rank in bf16: at the MLP hidden, residual, the result, and three inner widths."""
    by = planner("llama-3.1-8b", "a100", "bf16", tp=1)
    rows, hidden, inner = 8192, 4096, 14336
    assert of(by, rows).activations == pytest.approx(1.1 * rows * 2 * (3 * hidden + 3 * inner), rel=0.01)


def test_workspace_is_in_proportion_to_rows() -> None:
    by = planner("llama-3.1-8b", "a100", "bf16", tp=2)
    assert of(by, 16384).total == pytest.approx(2 * of(by, 8192).total, rel=0.01)


def test_scattered_rows_are_divided_by_the_ranks() -> None:
    """sglang #28884: a rank's memory is counted after rows are divided over groups and ranks."""
    wide, split = of(planner(dp=1, tp=8), 32768), of(planner(dp=8, tp=1), 32768)
    by = planner("llama-3.1-70b", "h200", "bf16", dp=1, tp=8)
    assert of(by, 8192, layout="sequence-parallel").activations < of(by, 8192).activations
    assert split.total < 1.2 * wide.total  # as many rows in all: no rank has eight times as much


def test_masks_on_gpus_grow_with_rows_and_context() -> None:
    """sglang #35201. With windows a chunk of a long prompt has a mask of its rows and context; else it needs none."""
    config = preset("llama-3.1-8b")
    assert isinstance(config.attention, GQA)
    windows = replace(config.attention, sliding_window=4096, sliding_layers=frozenset(range(config.num_hidden_layers)))
    rows = 8192
    by = planner(replace(config, attention=windows), "h200", "bf16", tp=1)
    half, chunk = (of(by, rows, context).activations for context in (65536, 131072))
    assert chunk - half == pytest.approx(POOL * MASK_BYTES * rows * 65536, rel=1e-6)
    assert of(by, 1, 131072, phase="decode").total < 0.01 * chunk
    half, chunk = (of(planner(config, "h200", "bf16", tp=1), rows, context).activations for context in (65536, 131072))
    assert half == chunk


def test_expanded_keys_on_gpus_have_a_bound() -> None:
    by, rows = planner(tp=1), 512
    short, long, longest = (of(by, rows, context).activations for context in (4096, 65536, 131072))
    assert long - short == pytest.approx(POOL * 2 * 2 * (FUSED_VALUES - 4096 * 128 * 256), rel=0.01)
    assert longest == long


def test_scores_on_cpus_are_held_in_blocks() -> None:
    by = planner("llama-3.1-8b", "cpu-core", "fp32", tp=2)
    short, long = (of(by, 512, context).activations for context in (4096, 65536))
    assert long == short, "the block of scores is as large as it gets in both"


def test_sampling_holds_float32_logits_of_the_rows_that_have_them() -> None:
    deployment = Deployment(
        config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=8), device=device("h200"), dtype="fp8", want_logits=True
    )
    by = Planner(deployment, WeightSharding())
    few, many = (of(by, rows, phase="decode").logits for rows in (64, 256))
    assert many == 4 * few == 3 * 256 * 4 * 129280
    assert of(planner(), 256, phase="decode").logits == 0  # each shard's best alone


def test_on_cpus_compiled_experts_keep_their_sums() -> None:
    by = planner("dsv3-mini", "cpu-core", "bf16", tp=2)
    assert of(by, 4096).kept == pytest.approx(4 * 4096 * 1024 + 16 * 4096 * 4, rel=0.01)
    assert of(planner("dsv3-mini", "cpu-core", "fp32", tp=2), 4096).kept == 0


def test_one_rank_has_no_collectives() -> None:
    by = planner("llama-3.1-8b", "a100", "bf16", tp=1)
    assert of(by, 4096).collectives == 0
    assert by.deployment.memory(WeightSharding()).process == GPU_PROCESS


def test_no_rows_need_nothing() -> None:
    by = planner("llama-3.1-8b", "a100", "bf16", dp=2, tp=1)
    plan = by.plan(StepShape.of(by.deployment.mesh, (0, 0), phase="decode", context=1), "auto")
    assert workspace(plan, by.chain.fields, Kernels(cpu=False, compiled=False, itemsize=2, skew=0.0)) == Workspace()
