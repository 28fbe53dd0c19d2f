"""Plans of ranks on several nodes: what is priced, chosen, printed, saved and refused. No torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from documents import run_for_both

from narrows.arch.presets import preset
from narrows.arch.stages import RowSet
from narrows.arch.weight_sharding import WeightSharding
from narrows.cli.main import main
from narrows.cost import Device, device
from narrows.cost.measured import CollectiveTable, Measured
from narrows.cost.network import network
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Algorithm, Mesh, MoveKind, Topology, full, moves_from, owed
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner
from narrows.plan.report.code import plan_code
from narrows.plan.report.evidence import nodes_line
from narrows.plan.report.explain import describe
from narrows.plan.report.saved import read_plan, write_plan

MESH = Mesh.of(dp=2, tp=2)
TWO = Topology(2, 2)
SLOW = network("ethernet-1")


def deployment(mesh: Mesh = MESH, nodes: Topology | None = TWO, on: Device | None = None, **more: Any) -> Deployment:
    return Deployment(
        config=preset("dsv3-mini"), mesh=mesh, device=on or device("cpu-core"), graph=False, nodes=nodes, **more
    )


def planned(found: Deployment, layout: str = "auto", rows: int = 512) -> Plan:
    shape = StepShape.of(
        found.mesh, (rows // found.mesh.num_groups,) * found.mesh.num_groups, phase="prefill", context=rows
    )
    return Planner(found, WeightSharding()).plan(shape, layout)


def algorithms(plan: Plan) -> set[Algorithm]:
    return {op.move.algorithm for _, op in plan.ops() if op.move is not None}


# -- prices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [Mesh.of(dp=1, tp=4), MESH, Mesh.of(dp=4, tp=1)], ids=str)
def test_one_node_is_what_a_plan_was(mesh: Mesh) -> None:
    for layout in applicable_layouts(preset("dsv3-mini"), mesh):
        plan = planned(deployment(mesh, None), layout)
        assert plan == planned(deployment(mesh, Topology(1, 4)), layout)
        assert plan.nodes is None and plan.internode_seconds == 0 and algorithms(plan) == {Algorithm.FLAT}


@pytest.mark.parametrize("mesh", [Mesh.of(dp=1, tp=4), MESH, Mesh.of(dp=4, tp=1)], ids=str)
def test_a_slower_network_makes_every_plan_dearer(mesh: Mesh) -> None:
    for layout in applicable_layouts(preset("dsv3-mini"), mesh):
        costs = [
            planned(found, layout).ps
            for found in (
                deployment(mesh, None),
                deployment(mesh, between=network("ib-400")),
                deployment(mesh, between=network("ethernet-10")),
                deployment(mesh, between=SLOW),
            )
        ]
        assert costs == sorted(costs) and costs[0] < costs[-1]


def test_on_a_slow_network_auto_does_other_things_and_is_far_cheaper_than_every_named_layout() -> None:
    one, two = planned(deployment(nodes=None), rows=2048), planned(deployment(between=SLOW), rows=2048)
    assert describe(one) != describe(two)
    assert algorithms(two) == {Algorithm.FLAT, Algorithm.HIERARCHICAL}
    named = [
        planned(deployment(between=SLOW), name, rows=2048)
        for name in applicable_layouts(preset("dsv3-mini"), MESH)
        if name != "auto"
    ]
    assert min(plan.ps for plan in named) > 1.1 * two.ps
    assert all(algorithms(plan) == {Algorithm.FLAT} for plan in named), "published code makes one call"


def test_ops_inside_a_node_cost_what_they_cost_on_one() -> None:
    shape = StepShape.of(MESH, (8, 8), phase="decode", context=64)
    near, far = deployment(nodes=None).pricer(shape), deployment(between=SLOW).pricer(shape)
    for move in moves_from(MESH, owed(MESH, 1)):  # along tp, whose two ranks share a node
        assert far.move(move, 2048, RowSet.ALL) == near.move(move, 2048, RowSet.ALL)
    for move in moves_from(MESH, owed(MESH)):
        assert far.move(move, 2048, RowSet.ALL).ps > near.move(move, 2048, RowSet.ALL).ps + 100e6


def test_a_group_that_straddles_two_nodes_sets_the_price_of_all() -> None:
    # 3 groups of 4 on 2 nodes of 6: the middle one lies on both.
    mesh, nodes = Mesh.of(dp=3, tp=4), Topology(2, 6)
    shape = StepShape.of(mesh, (4, 4, 4), phase="decode", context=64)
    found = deployment(mesh, nodes, between=SLOW)
    (reduce,) = [move for move in moves_from(mesh, owed(mesh, 1)) if move.kind is MoveKind.ALL_REDUCE]
    near = deployment(mesh, None).pricer(shape).move(reduce, 2048, RowSet.ALL)
    assert found.pricer(shape).move(reduce, 2048, RowSet.ALL).ps > near.ps + 200e6


def test_what_was_measured_on_several_nodes_is_the_price() -> None:
    def table(op: str, ranks: int, nodes: int, axis: str, us: float) -> CollectiveTable:
        return CollectiveTable(op=op, ranks=ranks, axis=axis, nodes=nodes, points=[[64, us], [1 << 30, us + 1]])

    tables = [
        table("all_reduce", 4, 1, "inner", 7.0),
        table("all_reduce", 4, 2, "inner", 1000.0),
        table("all_reduce", 2, 2, "outer", 300.0),
        table("reduce_scatter", 2, 1, "inner", 10.0),
        table("all_gather", 2, 1, "inner", 20.0),
    ]
    measured = replace(device("cpu-core"), name="measured", measured=Measured(collectives=tables))
    shape = StepShape.of(MESH, (1, 1), phase="decode", context=64)
    flat, hierarchical = [m for m in moves_from(MESH, owed(MESH), TWO) if m.dst == full(MESH)]
    prices = deployment(on=measured).pricer(shape)
    # 64 bytes in all, 32 between the nodes, which the first point is taken for.
    assert prices.move(flat, 32, RowSet.ALL).ps == 1000_000_000
    assert prices.move(hierarchical, 32, RowSet.ALL).ps == (10 + 300 + 20) * 1_000_000
    assert deployment(nodes=None, on=measured).pricer(shape).move(flat, 32, RowSet.ALL).ps == 7_000_000
    assert "nodes" not in tables[0].model_dump() and tables[1].model_dump()["nodes"] == 2
    with pytest.raises(ValueError, match="3 ranks cannot lie on 2 nodes"):
        table("all_reduce", 3, 2, "inner", 1.0)


def test_planning_for_nodes_asks_for_at_most_twice_the_prices() -> None:
    asked = []
    for nodes in (None, TWO):
        planner = Planner(deployment(nodes=nodes), WeightSharding())
        planner.plan(StepShape.of(MESH, (8, 8), phase="decode", context=64))
        asked.append(len(planner.graph("auto").asks))
    assert asked[0] < asked[1] < 2 * asked[0]


# -- words, files and refusals -----------------------------------------------------------------------------------------


def test_plans_say_how_collectives_are_done_and_come_back_from_files(tmp_path: Path) -> None:
    plan, file = planned(deployment(between=SLOW)), tmp_path / "plan.json"
    assert 'algorithm="hierarchical"' in plan_code(plan) and "hierarchical" in describe(plan)
    write_plan(file, plan, preset("dsv3-mini"), WeightSharding())
    back, _ = read_plan(file, preset("dsv3-mini"), MESH)
    assert back == plan and back.nodes == TWO
    document = json.loads(file.read_text())
    assert document["nodes"] == "2x2"
    document.pop("nodes")  # as files were before
    for segment in document["segments"]:
        for op in segment["ops"]:
            if op["move"]:
                op["move"].pop("algorithm")
    file.write_text(json.dumps(document))
    old, _ = read_plan(file, preset("dsv3-mini"), MESH)
    assert old.nodes is None and algorithms(old) == {Algorithm.FLAT}
    document["nodes"] = "3x2"
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="--nodes 3x2 holds 6 ranks"):
        read_plan(file, preset("dsv3-mini"), MESH)


def test_plans_that_differ_in_the_algorithm_alone_are_two() -> None:
    plan = planned(deployment(between=SLOW))
    segment = plan.segments[1]
    ops = tuple(
        op if op.move is None else replace(op, move=replace(op.move, algorithm=Algorithm.FLAT)) for op in segment.ops
    )
    assert plan.signature() != replace(plan, segments=(plan.segments[0], replace(segment, ops=ops))).signature()


def test_what_connects_ranks_is_said() -> None:
    line = nodes_line(deployment(between=SLOW))
    assert line.startswith("2 nodes of 2 ranks, connected by ethernet-1 (1 Gb/s Ethernet, TCP, 0.117 GB/s per host)")
    v3 = Deployment(config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=16), device=device("h100"), dtype="fp8")
    assert "16 ranks are priced as one node, and h100 has at most 8 in one; --nodes 2x8" in nodes_line(v3)
    assert nodes_line(replace(v3, device=device("gb200"))) == ""
    assert nodes_line(replace(v3, mesh=Mesh.of(dp=1, tp=8))) == ""
    assert nodes_line(deployment(nodes=None)) == ""
    assert replace(v3, nodes=Topology(2, 8)).network == network("ib-400")


PLAN = "plan dsv3-mini --device cpu-core --dp 2 --tp 2 --rows 64 --context 64"


@pytest.mark.slow
def test_plan_prints_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run_for_both(capsys, f"{PLAN} --nodes 2x2 --network ethernet-1".split(), 0)
    text = " ".join(out.split())
    assert "4 x one core of a Xeon with AMX, 2 nodes of 2, bf16" in text
    assert "of it between nodes" in text and "connected by ethernet-1" in text
    assert (found["nodes"], found["network"]) == ("2x2", "ethernet-1")
    for layout in found["layouts"]:
        ops = layout["ops"]
        assert {op["nodes"] for op in ops} == {1, 2}
        between = sum(op["us"] * op["times"] for op in ops if op["nodes"] > 1)
        assert layout["between_nodes_ms"] == pytest.approx(between / 1e3, rel=1e-4)
    auto = next(layout for layout in found["layouts"] if layout["name"] == "auto")
    assert "hierarchical" in {op["algorithm"] for op in auto["ops"]} and ", hierarchical" in out


@pytest.mark.slow
def test_simulate_takes_nodes_and_searches_their_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    load = "--num-requests 4 --input-length 64 --output-length 4 --kv-tokens 4096"
    line = f"simulate dsv3-mini --device cpu-core --tp 4 {load}"
    _, one = run_for_both(capsys, line.split(), 0)
    out, two = run_for_both(capsys, f"{line} --nodes 2x2 --network ethernet-1".split(), 0)
    assert "2 nodes of 2 ranks, connected by ethernet-1" in " ".join(out.split())
    mean = [found["candidates"][0]["figures"]["tpot_ms"]["mean"] for found in (one, two)]
    assert mean[1] > 1.2 * mean[0]
    assert (two["nodes"], two["network"]) == ("2x2", "ethernet-1") and (one["nodes"], one["network"]) == ("", "")
    _, found = run_for_both(
        capsys, f"simulate dsv3-mini --device cpu-core --search --nodes 2x2 --layout auto {load}".split(), 0
    )
    assert {tuple(each["mesh"].values()) for each in found["candidates"]} == {(1, 4), (2, 2), (4, 1)}
    assert found["network"] == "ethernet-10"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{PLAN} --nodes 2x8", "--nodes 2x8 holds 16 ranks, but dp 2 x tp 2 has 4; --nodes 2x2 would hold them"),
        (f"{PLAN} --nodes 2", "--nodes '2': NODESxRANKS is needed, such as 2x8"),
        (
            f"{PLAN} --network ib-400",
            "--network ib-400 connects nodes, and all 4 ranks are on one; say --nodes NxR too",
        ),
        (
            "simulate dsv3-mini --device cpu-core --tp 2 --network ib-400",
            "--network ib-400 connects nodes: say --nodes NxR too",
        ),
        (
            "simulate dsv3-mini --device cpu-core --search --num-gpus 3 --nodes 2x2",
            "--nodes 2x2 holds 4 ranks, 2 a node; 3 leaves a node with 1",
        ),
    ],
)
def test_nodes_that_cannot_be_are_one_line(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
