"""Price tables made from measured seconds: they price the measured plans at their measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.calibrate.price_tables import OPS, Tables
from narrows.cost.devices import device
from narrows.cost.measured import CollectiveTable, Measured
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.plan import Op, OpKind, Plan
from narrows.plan.planner import Deployment, Planner

CONFIG, MESH = preset("dsv3-mini"), Mesh.of(dp=1, tp=2)


def plan_of(rows: int, measured: Measured | None = None) -> Plan:
    hardware = replace(device("cpu-core"), fused_norm_bytes=0, measured=measured)
    planner = Planner(Deployment(config=CONFIG, mesh=MESH, device=hardware, graph=False), WeightSharding())
    shape = StepShape.of(MESH, (rows,), phase="decode", context=64)
    return planner.plan(shape, "attn-tp-input-scattered")


def took(op: Op) -> float:
    """Made-up seconds of a step: by class and rows, or by the bytes of a collective."""
    if op.kind is OpKind.MOVE:
        return 1e-5 + 1e-10 * op.nbytes
    return 1e-5 * (1 + len(op.price_class) + op.rows)


def times_of(plan: Plan, pace: float) -> Sequence[float]:
    """Layers of a kind differ by turns, but not on the mean; the odd one is as the mean."""
    times = {id(op): sum(other is op for _, other in plan.ops()) for _, op in plan.ops()}
    seconds, nth = [], dict.fromkeys(times, 0)
    for _, op in plan.ops():
        nth[id(op)] += 1
        last_and_odd = nth[id(op)] == times[id(op)] and times[id(op)] % 2
        seconds.append(pace * took(op) * (1.0 if last_and_odd else 1.4 if nth[id(op)] % 2 else 0.6))
    return seconds


def empty() -> Tables:
    tables = Tables()
    tables.rates.append((1e10, 1e11))
    tables.copies = {512: [1e-6], 8192: [2e-6]}
    return tables


def test_plans_are_priced_at_their_measured_time() -> None:
    tables = empty()
    plans = [plan_of(rows) for rows in (8, 16, 64)]
    for plan in plans:
        for pace in (1.0, 3.0, 0.7):  # the median counts
            tables.add_execution(plan, times_of(plan, pace))
    measured = tables.calibration(1.0).measured
    for plan in plans:
        priced = plan_of(plan.shape.rows.total, measured)
        assert [op.name for _, op in priced.ops()] == [op.name for _, op in plan.ops()]
        for _, op in priced.ops():
            if op.move is not None and op.meets:
                assert op.seconds == pytest.approx(took(op), rel=0.1), "sizes near each other are one"
            elif op.kind is OpKind.STAGE and op.stage is not None and op.stage.work:
                assert op.source is Source.MEASURED and op.seconds == pytest.approx(took(op)), op.name


def found(tables: Tables, op: str) -> CollectiveTable:
    (one,) = [each for each in tables.calibration(1.0).measured.collectives if each.op == op]
    return one


def seconds(table: CollectiveTable) -> dict[float, float]:
    return {row[0]: row[1] / 1e6 for row in table.points}


def test_unseen_collectives_are_scaled_as_seen_ones() -> None:
    tables = empty()
    key = "all_reduce", 2, "inner"
    tables.alone = {(op, 2, "inner"): {1000: [1e-5], 100_000: [4e-5], 10_000_000: [3e-3]} for op in OPS.values()}
    tables.moves = {"prefill": {key: {1000: [3e-5, 3e-5, 9e-5], 1100: [3e-5], 100_000: [4.4e-5]}}}
    assert seconds(found(tables, "all_reduce")) == pytest.approx({1050: 3e-5, 100_000: 4.4e-5, 10_000_000: 3.3e-3})
    assert seconds(found(tables, "all_gather")) == pytest.approx({1000: 3e-5, 100_000: 4.4e-5, 10_000_000: 3.3e-3})
    assert found(tables, "all_gather").phase == "prefill"


def test_a_collective_is_never_cheaper_in_a_plan_than_alone() -> None:
    tables = empty()
    tables.alone = {(op, 2, "inner"): {1000: [1e-5], 100_000: [4e-5]} for op in OPS.values()}
    tables.moves = {"decode": {("all_reduce", 2, "inner"): {1000: [1e-6]}}}
    assert seconds(found(tables, "reduce_scatter")) == pytest.approx({1000: 1e-5, 100_000: 4e-5})
