"""Sources of predictions: shares that add up, and a line only where prices are unmeasured."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner
from narrows.plan.report import evidence
from narrows.plan.report.evidence import Evidence, evidence_line

MESH = Mesh.of(dp=1, tp=8)


def plan_on(name: str) -> Plan:
    deployment = Deployment(config=preset("deepseek-v3"), mesh=MESH, device=device(name), dtype="bf16")
    return Planner(deployment, WeightSharding()).plan(StepShape.of(MESH, (4096,), phase="prefill", context=4096))


def as_if(plan: Plan, source: Source) -> Plan:
    """The plan with every price from one source."""
    segments = tuple(
        replace(segment, ops=tuple(replace(op, source=source) for op in segment.ops)) for segment in plan.segments
    )
    return replace(plan, segments=segments)


def test_doctests() -> None:
    result = doctest.testmod(evidence)
    assert result.attempted and not result.failed


def test_shares_are_of_predicted_seconds_and_count_every_layer() -> None:
    plan = plan_on("h100")
    found = Evidence.of(plan)
    by_hand = dict.fromkeys(Source, 0)
    for _, op in plan.ops():
        by_hand[op.source] += op.ps
    assert found.ps == tuple(by_hand.values()) and sum(found.ps) == plan.ps
    assert sum(found.shares.values()) == pytest.approx(1) and len(found.shares) > 1
    assert Evidence.of(plan, plan).shares == found.shares


@pytest.mark.parametrize("source", Source)
def test_only_unmeasured_prices_are_named(source: Source) -> None:
    line = evidence_line("h100", {"prefill of 4096 rows": as_if(plan_on("h100"), source)})
    if source in (Source.MEASURED, Source.INTERPOLATED):
        assert not line
    else:
        assert line.startswith("predictions for h100 rest on unmeasured prices: prefill of 4096 rows 100 % ")
        assert f"100 % {source.label};" in line and "narrows calibrate" in line and "\n" not in line


def test_plans_that_are_measured_are_left_out_of_the_line() -> None:
    plan = plan_on("cpu-core")
    line = evidence_line("x", {"one": as_if(plan, Source.MEASURED), "two": as_if(plan, Source.SCALED)}, way_out="")
    assert line.endswith(": two 100 % scaled")
