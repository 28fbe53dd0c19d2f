"""Bands of prices: they follow from measurements of this package's tables, and add up by kind."""

from __future__ import annotations

import doctest
import importlib.util
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from narrows.arch.presets import preset
from narrows.arch.stages import Gemm, GroupedGemm, PriceClass, Stream
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost import bands
from narrows.cost.bands import KINDS, SERVED, SHARE, band, total_band, work_band
from narrows.cost.devices import device
from narrows.cost.engines import ENGINES, KERNELS_ALONE
from narrows.cost.grids import grids
from narrows.cost.measured import CollectiveTable, Measured, StageTable
from narrows.cost.price import Price, Source
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def derived() -> ModuleType:
    """The script that derives them."""
    spec = importlib.util.spec_from_file_location("price_bands", ROOT / "benchmarks" / "price_bands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan_on(name: str, **more: object) -> Plan:
    mesh = Mesh.of(dp=1, tp=8)
    deployment = Deployment(config=preset("deepseek-v3"), mesh=mesh, device=device(name), dtype="fp8", **more)  # type: ignore[arg-type]
    return Planner(deployment, WeightSharding()).plan(StepShape.of(mesh, (8192,), phase="prefill", context=4096))


def test_doctests() -> None:
    result = doctest.testmod(bands)
    assert result.attempted and not result.failed


def test_weaker_evidence_has_the_wider_band() -> None:
    for price_class in PriceClass:
        found = [band(price_class, source) for source in Source]
        assert found == sorted(found) and (KINDS[price_class] == "host" or 0 < found[0] < found[-1] < 2)


def test_each_engine_has_bands_of_published_runs() -> None:
    assert set(SERVED) == set(ENGINES) - {KERNELS_ALONE.name}
    assert all(low < high for found in SERVED.values() for low, high in found.values())


@pytest.mark.parametrize(
    ("kernel", "kind", "price_class"),
    [("gemm_fp8", "gemm", PriceClass.MLP), ("moe", "experts", PriceClass.EXPERTS)],
)
def test_bands_hold_what_is_left_out_of_the_tables(
    derived: ModuleType, kernel: str, kind: str, price_class: PriceClass
) -> None:
    """On one device: sizes left out of the curves lie within the band of interpolated prices as often as said."""
    curves = [curve for grid in grids("h200", kernel).values() for curve in grid.curves.values()]
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for curve in curves[::5]:
        for _, source, ratio in derived.left_out(kind, curve):
            ratios[source].append(ratio)
    found = ratios["interpolated"]
    limit = math.log1p(band(price_class, Source.INTERPOLATED))
    inside = sum(abs(math.log(ratio)) <= limit for ratio in found) / len(found)
    assert len(found) > 500 and inside > SHARE


def test_roofline_bands_hold_stages_priced_without_their_tables(derived: ModuleType) -> None:
    ratios = [ratio for kind, source, ratio in derived.rooflines_of_links()]
    limit = math.log1p(band(PriceClass.COMMUNICATION, Source.ROOFLINE))
    assert sum(abs(math.log(ratio)) <= limit for ratio in ratios) >= math.floor(SHARE * len(ratios))


def test_errors_of_a_sum() -> None:
    """Of one kind they add, of different kinds they add as squares."""
    same = [(PriceClass.MLP, 1.0, 0.1), (PriceClass.LM_HEAD, 1.0, 0.1)]
    other = [(PriceClass.MLP, 1.0, 0.1), (PriceClass.EXPERTS, 1.0, 0.1)]
    assert total_band(same) == pytest.approx(0.1) and total_band(other) == pytest.approx(0.1 / math.sqrt(2))
    assert total_band([]) == 0.0
    assert (Price(1.0, Source.MEASURED, 0.1) + Price(2.0, Source.ROOFLINE, 0.4)).error == pytest.approx(0.5)
    assert Price(1.0, Source.MEASURED, 0.1).times(3).error == pytest.approx(0.3)
    assert Price(1.0, Source.MEASURED, 0.1) == Price(1.0, Source.MEASURED)


def test_a_stage_has_the_error_of_its_parts() -> None:
    """Experts of H200 are measured, the passes around them are not: the stage says roofline, but errs far less."""
    plan = plan_on("h200")
    experts = next(op for _, op in plan.ops() if op.name == "experts")
    assert experts.error_ps is not None
    assert experts.error / experts.ps < band(PriceClass.EXPERTS, Source.SCALED)
    moved = next(op for _, op in plan.ops() if op.is_collective)
    assert moved.error == moved.ps * band(PriceClass.COMMUNICATION, moved.source)
    assert work_band(GroupedGemm(experts=1, n=1, k=1, pairs_per_row=1.0), Source.MEASURED) == band(
        PriceClass.EXPERTS, Source.MEASURED
    )
    assert work_band(Gemm(n=1, k=1), Source.ROOFLINE) > work_band(Stream(row_bytes=1), Source.ROOFLINE)


def test_a_plan_is_surer_where_its_device_was_measured() -> None:
    measured, rough = plan_on("h200"), plan_on("h20")
    assert 0.03 < measured.band < rough.band < 0.6
    blind = replace(device("h200"), kernels=None, name="h200 blind")
    mesh = Mesh.of(dp=1, tp=8)
    deployment = Deployment(config=preset("deepseek-v3"), mesh=mesh, device=blind, dtype="fp8")
    shape = StepShape.of(mesh, (8192,), phase="prefill", context=4096)
    assert Planner(deployment, WeightSharding()).plan(shape).band > measured.band


def test_a_profile_has_the_scatter_of_its_own_measurements() -> None:
    """Points of 10 % and 30 % spread: the median half is 10 %; a point without a spread says nothing."""
    work = (Gemm(n=64, k=64),)
    table = StageTable(stage=PriceClass.MLP, dtype="bf16", work=list(work), points=[[1, 5, 0.1], [8, 9, 0.3], [64, 40]])
    moved = CollectiveTable(op="all_reduce", ranks=2, points=[[64, 5.0, 0.04], [4096, 9.0, 0.08]])
    measured = Measured(stages=(table,), collectives=(moved,))
    assert measured.scatter(PriceClass.MLP) == pytest.approx(0.1)
    assert measured.scatter(PriceClass.COMMUNICATION) == pytest.approx(0.03)
    assert measured.scatter(PriceClass.NORM) is None
    assert band(PriceClass.MLP, Source.MEASURED, 0.02) == pytest.approx(0.02)
    assert band(PriceClass.MLP, Source.INTERPOLATED, 0.02) > 0.1
    assert band(PriceClass.MLP, Source.ROOFLINE, 0.02) == band(PriceClass.MLP, Source.ROOFLINE)
