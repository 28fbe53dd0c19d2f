"""Price tables made from measured seconds: they price the measured plans at their measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.calibrate.price_tables import OPS, Among, Tables
from narrows.cost.devices import device
from narrows.cost.measured import CollectiveTable, Measured
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.layout import Algorithm, Mesh, MoveKind, Topology, moves_from, owed
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
            if op.move is not None and op.is_collective:
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
    key = Among("all_reduce", 2, "inner")
    tables.alone = {Among(op, 2, "inner"): {1000: [1e-5], 100_000: [4e-5], 10_000_000: [3e-3]} for op in OPS.values()}
    tables.moves = {"prefill": {key: {1000: [3e-5, 3e-5, 9e-5], 1100: [3e-5], 100_000: [4.4e-5]}}}
    assert seconds(found(tables, "all_reduce")) == pytest.approx({1050: 3e-5, 100_000: 4.4e-5, 10_000_000: 3.3e-3})
    assert seconds(found(tables, "all_gather")) == pytest.approx({1000: 3e-5, 100_000: 4.4e-5, 10_000_000: 3.3e-3})
    assert found(tables, "all_gather").phase == "prefill"


def test_a_collective_is_never_cheaper_in_a_plan_than_alone() -> None:
    tables = empty()
    tables.alone = {Among(op, 2, "inner"): {1000: [1e-5], 100_000: [4e-5]} for op in OPS.values()}
    tables.moves = {"decode": {Among("all_reduce", 2, "inner"): {1000: [1e-6]}}}
    assert seconds(found(tables, "reduce_scatter")) == pytest.approx({1000: 1e-5, 100_000: 4e-5})


def test_groups_on_several_hosts_have_tables_of_their_own() -> None:
    """Each level is priced by itself, and what is done in two levels as it was."""
    mesh, nodes = Mesh.of(dp=2, tp=2), Topology(2, 2)

    def planned(layout: str, measured: Measured | None = None) -> Plan:
        hardware = replace(device("cpu-core"), fused_norm_bytes=0, measured=measured)
        deployment = Deployment(config=CONFIG, mesh=mesh, device=hardware, graph=False, nodes=nodes)
        shape = StepShape.of(mesh, (1024, 1024), phase="prefill", context=1024)
        return Planner(deployment, WeightSharding() if layout != "auto" else None).plan(shape, layout)

    def slow(op: Op) -> float:
        """As `took`, and ten times that where ranks meet over both hosts."""
        crosses = op.move is not None and op.is_collective and nodes.levels(op.move.groups)[0].spans
        factor = 10 if crosses else 1
        return took(op) * (factor / 2 if op.move and op.move.algorithm is Algorithm.HIERARCHICAL else factor)

    tables = empty()
    tables.num_nodes = 2
    flat, auto = planned("sequence-parallel"), planned("auto")
    assert any(op.move is not None and op.move.algorithm is Algorithm.HIERARCHICAL for _, op in auto.ops())
    for plan in (flat, flat, auto):
        tables.add_execution(plan, [slow(op) for _, op in plan.ops()])
    for axes, nodes_of, way, factor in (((0, 1), 2, 0, 10), ((1, 2), 1, 0, 1), ((0, 2), 2, 0, 10), ((0, 2), 2, 1, 5)):
        for op in OPS.values():
            among = Among.of(op, mesh, axes, nodes, tuple(Algorithm)[way])
            assert among.nodes == nodes_of
            tables.alone[among] = {n: [factor * (1e-5 + 1e-10 * n)] for n in (1000, 1_000_000, 10_000_000)}
    measured = tables.calibration(1.0).measured
    assert {(each.ranks, each.axis, each.nodes, each.algorithm) for each in measured.collectives} == {
        (2, "outer", 2, "flat"),
        (2, "inner", 1, "flat"),
        (4, "inner", 2, "flat"),
        (4, "inner", 2, "hierarchical"),
    }
    ran = {(op.move, op.stage, op.nbytes) for plan in (flat, auto) for _, op in plan.ops()}
    for layout, ways in (("sequence-parallel", {Algorithm.FLAT}), ("auto", {*Algorithm})):
        again = [
            op
            for _, op in planned(layout, measured).ops()
            if op.is_collective and (op.move, op.stage, op.nbytes) in ran
        ]
        assert ways <= {op.move.algorithm for op in again if op.move}
        for op in again:
            assert op.seconds == pytest.approx(slow(op), rel=0.1)


def test_a_hierarchical_collective_is_no_point_of_the_flat_one() -> None:
    mesh, nodes = Mesh.of(dp=1, tp=4), Topology(2, 2)
    (flat, levels) = (
        move for move in moves_from(mesh, owed(mesh), nodes) if move.kind is MoveKind.ALL_REDUCE
    )  # fmt: skip
    assert levels.algorithm is Algorithm.HIERARCHICAL
    tables = empty()
    tables.num_nodes = 2
    for move, seconds_of in ((flat, 2.0), (levels, 1.0)):
        tables._book_move("all_reduce", move, "prefill", 1000, seconds_of)
    (found,) = tables.moves.values()
    assert {key.algorithm: points for key, points in found.items()} == {
        "flat": {1000: [2.0]},
        "hierarchical": {1000: [1.0]},
    }
