"""Measured kernels of GPUs: points, prices between and beyond them, and what engines add and save."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.arch.chain import build_chain
from narrows.arch.presets import preset
from narrows.arch.stages import RoutedExperts
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost import Source, device
from narrows.cost.attention import AttentionShape, attention_price
from narrows.cost.engines import ENGINES, EngineStyle, engine_style
from narrows.cost.experts import experts_price
from narrows.cost.gemm import absorbed_price
from narrows.cost.grids import Grid, grids
from narrows.cost.imbalance import DEFAULT_SKEW
from narrows.cost.price import Curve
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.plan.planner import Deployment, Planner
from narrows.plan.report.plan_report import make_report
from narrows.sim.serving import serving

V3 = RoutedExperts(hidden=7168, intermediate=2048, experts=256, top_k=8, ranks=8, whole=False)
QWEN3 = RoutedExperts(hidden=4096, intermediate=1536, experts=128, top_k=8, ranks=4, whole=False)


def attention(name: str, *, rows: int, context: int, decode: bool, heads: int = 16, kv_dtype: str = "bf16") -> float:
    """Microseconds of DeepSeek's attention."""
    shape = AttentionShape(
        latent=True,
        heads=heads,
        kv_heads=1,
        head_dim=160,
        decode=decode,
        rows=rows,
        context=context,
        flops=2.0 * rows * context * heads * 1088,
        kv_bytes=1152.0 * rows * context,
    )
    return attention_price(device(name), shape, dtype="bf16", kv_dtype=kv_dtype).seconds * 1e6


@pytest.mark.parametrize(
    ("found", "expected"),
    [  # the rows of the tables, by hand
        (attention("h200", rows=1024, context=4096, decode=True, heads=128, kv_dtype="fp8"), 1774),
        (attention("h200", rows=256 * 128, context=128, decode=False, heads=128, kv_dtype="fp8"), 3324),
        (experts_price(device("h200"), QWEN3, 64, "fp8", 0.0), 188.2),
    ],
)
def test_a_point_of_a_table_is_its_time(found: object, expected: float) -> None:
    if not isinstance(found, float):
        assert found is not None
        found = found.seconds * 1e6  # type: ignore[attr-defined]
    assert found == pytest.approx(expected, rel=1e-3)


def test_between_points_the_time_is_the_mean_of_logarithms() -> None:
    grid = Grid.of({(a,): Curve(xs=(1, 4), ys=(a * 1e-6, 4e-6 * a)) for a in (1, 4)})
    assert grid.at((2,), 2).seconds == pytest.approx(4e-6)
    assert grid.at((2,), 2).source == Source.INTERPOLATED
    assert grid.at((4,), 1).seconds == pytest.approx(4e-6)
    assert grid.at((4,), 1).source == Source.MEASURED


def test_the_weight_of_a_missing_corner_goes_to_the_others() -> None:
    curve = Curve(xs=(1, 2), ys=(1e-6, 2e-6))
    grid = Grid.of({(1, 1): curve, (1, 4): curve, (4, 1): curve})
    assert grid.at((2, 2), 1).seconds == pytest.approx(1e-6)
    assert grid.at((4, 4), 2).seconds == pytest.approx(2e-6)


@settings(deadline=None)
@given(st.sampled_from(("h100", "h200", "b200", "gb200")), st.integers(1, 300), st.integers(2, 100_000))
def test_more_heads_rows_and_context_never_cost_much_less(name: str, rows: int, context: int) -> None:
    # Sweeps scatter, so that a larger kernel may seem a little cheaper.
    one = attention(name, rows=rows, context=context, decode=True)
    for more in (
        attention(name, rows=4 * rows, context=context, decode=True),
        attention(name, rows=rows, context=4 * context, decode=True),
        attention(name, rows=rows, context=context, decode=True, heads=64),
    ):
        assert more > 0.8 * one


def test_a_chunk_costs_the_difference_of_two_prompts() -> None:
    whole, before = (attention("h200", rows=n, context=n, decode=False) for n in (8192, 6144))
    assert attention("h200", rows=2048, context=8192, decode=False) == pytest.approx(whole - before)


def test_absorbed_products_are_measured_per_head() -> None:
    few, many = (absorbed_price(device("h200"), heads, 64, "fp8") for heads in (8, 128))
    assert few is not None and many is not None and few.seconds < many.seconds
    assert absorbed_price(device("h20"), 16, 64, "fp8") is None


@pytest.mark.parametrize("rows", [1, 16, 256, 4096, 16384])
def test_an_unmeasured_model_is_scaled_from_the_nearest(rows: int) -> None:
    h200 = device("h200")
    own = experts_price(h200, V3, rows, "fp8", DEFAULT_SKEW)
    narrower = RoutedExperts(hidden=7168, intermediate=1024, experts=256, top_k=8, ranks=8, whole=False)
    other = experts_price(h200, narrower, rows, "fp8", DEFAULT_SKEW)
    assert own is not None and other is not None and other.source == Source.SCALED
    assert own.seconds / 2 <= other.seconds * (1 + 1e-9) <= own.seconds


def test_a_device_without_measured_experts_has_none() -> None:
    assert experts_price(device("h20"), V3, 64, "fp8", DEFAULT_SKEW) is None
    assert experts_price(device("h200"), V3, 64, "fp32", DEFAULT_SKEW) is None


def test_every_table_can_be_read() -> None:
    for name in ("a100", "h100", "h200", "b200", "gb200"):
        for kernel in ("gemm_bf16", "mla_decode", "mla_prefill", "mla_bmm", "gqa_prefill", "moe"):
            for grid in grids(name, kernel).values():
                assert all(math.isfinite(y) and y > 0 for curve in grid.curves.values() for y in curve.ys)
    assert not grids("h20", "moe")


V3_ON_H200 = Deployment(config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=8), device=device("h200"), dtype="fp8")


def step_ps(engine: EngineStyle, *, kv_dtype: str = "bf16", rows: int = 8) -> int:
    deployment = replace(V3_ON_H200, engine=engine, kv_dtype=kv_dtype)
    shape = StepShape.of(deployment.mesh, (rows,), phase="decode", context=4096)
    return Planner(deployment, WeightSharding()).plan(shape, "all-reduce").ps


def test_an_engine_adds_its_host_and_saves_its_overlap() -> None:
    alone = step_ps(EngineStyle(name="none"))
    assert step_ps(EngineStyle(name="host", host_s=1e-3, host_row_s=1e-4)) == alone + round((1e-3 + 8e-4) * 1e12)
    overlap = step_ps(EngineStyle(name="overlap", launch_overlap_s=1e-6))
    assert alone - 1.3e9 < overlap < alone - 0.7e9  # about a thousand kernels
    assert step_ps(EngineStyle(name="much", launch_overlap_s=1.0)) >= alone // 2
    assert step_ps(EngineStyle(name="beside", parallel_shared_expert=True)) < alone


def test_an_fp8_cache_is_read_faster_and_takes_half() -> None:
    none = EngineStyle(name="none")
    assert step_ps(none, kv_dtype="fp8", rows=64) < step_ps(none, rows=64)
    narrow = replace(V3_ON_H200, kv_dtype="fp8")
    assert 2 * narrow.memory(WeightSharding()).kv_per_token == V3_ON_H200.memory(WeightSharding()).kv_per_token


def test_a_parallel_shared_expert_costs_only_its_excess_time() -> None:
    deployment = replace(V3_ON_H200, engine=EngineStyle(name="beside", parallel_shared_expert=True))
    stage = next(
        stage for stage in build_chain(deployment.config, deployment.mesh).layer_types[-1].stages if stage.routed
    )
    shape = StepShape.of(deployment.mesh, (64,), phase="decode", context=4096)
    beside, after = (
        each.pricer(shape).stage(stage, stage.accepts, False, stage.row_set) for each in (deployment, V3_ON_H200)
    )
    routed = replace(stage, work=stage.work[: stage.routed.num_items])
    shared = replace(stage, work=stage.work[stage.routed.num_items :], routed=None)
    parts = [V3_ON_H200.pricer(shape).stage(part, stage.accepts, False, stage.row_set).ps for part in (routed, shared)]
    assert abs(sum(parts) - after.ps) <= 2 and beside.ps == max(parts)
    long = replace(stage, work=stage.work[: stage.routed.num_items] + 100 * shared.work)
    assert deployment.pricer(shape).stage(long, stage.accepts, False, stage.row_set).ps > 2 * parts[0]


def test_fp8_has_block_scales_where_checkpoints_do() -> None:
    llama = Deployment(config=preset("llama-3.1-70b"), mesh=Mesh.of(dp=1, tp=2), device=device("h200"), dtype="fp8")
    assert V3_ON_H200.block_scales and not llama.block_scales
    assert llama.pricer(StepShape.of(llama.mesh, (8,), phase="decode", context=64))._fp8("fp8") == "fp8-tensor"
    shape = StepShape.of(llama.mesh, (4096,), phase="prefill", context=4096)
    by_block = replace(llama, config=replace(llama.config, quantization=V3_ON_H200.config.quantization))
    mlp = {
        each: Planner(each, WeightSharding()).plan(shape, "all-reduce").totals()["mlp"] for each in (llama, by_block)
    }
    assert mlp[llama] != mlp[by_block]


@pytest.mark.parametrize("experts", ["split", "whole"])
def test_every_layout_has_the_requested_expert_sharding(experts: str) -> None:
    deployment = replace(V3_ON_H200, experts=experts)
    report = make_report(deployment, StepShape.of(deployment.mesh, (64,), phase="decode", context=4096))
    assert {entry.sharding.experts for entry in report.entries} == {experts}
    found = serving(deployment, "all-reduce", rows_per_step=1024, max_context=4096)
    assert found.sharding.experts == experts


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"experts": "some"}, r"--experts 'some' is not known; it is one of split, whole"),
        ({"experts": "whole", "config": preset("llama-3.1-8b")}, r"llama-3.1-8b has no experts; leave it out"),
        ({"experts": "whole", "mesh": Mesh.of(dp=512, tp=1)}, r"256 experts cannot be dealt whole to 512 ranks; use"),
        ({"kv_dtype": "int4"}, r"--kv-dtype 'int4' is not known; it is one of bf16, fp8"),
        ({"kv_dtype": "fp8", "dtype": "fp32"}, r"--kv-dtype fp8 is for GPUs .* this is h200 in fp32"),
        ({"kv_dtype": "fp8", "dtype": "bf16", "device": device("cpu-core")}, r"this is cpu-core in bf16; leave it out"),
        (
            {"engine": ENGINES["vllm"], "dtype": "bf16", "device": device("cpu-core")},
            r"engine on GPUs, not on cpu-core",
        ),
    ],
)
def test_impossible_options_are_a_one_line_error(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        replace(V3_ON_H200, **change)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine 'x' is not known; engines: none, sglang"):
        engine_style("x")
    assert all(style.source for style in ENGINES.values())
