"""Profiles: writing and reading, errors that name the place, and measured prices instead of rooflines."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.chain import build_chain
from narrows.arch.presets import load_model_config
from narrows.arch.stages import Gemm, Norm, PriceClass, RowSet, Stage, Work
from narrows.cost.devices import DEVICES, Device
from narrows.cost.environment import MachineFingerprint, this_machine
from narrows.cost.measured import CollectiveTable, Measured, StageTable, StepTable
from narrows.cost.price import Source
from narrows.cost.pricer import Pricer, StepShape
from narrows.cost.profile import DeviceFigures, Profile, choose_device, read_profile, write_profile
from narrows.errors import ConfigError
from narrows.layout import Mesh, full, moves_from, owed, scattered
from narrows.plan.planner import Deployment, Planner, choose_sharding

MESH = Mesh.of(dp=1, tp=2)
CONFIG = load_model_config("dsv3-mini")


def stage(name: str) -> Stage:
    chain = build_chain(CONFIG, MESH)
    return next(each for kind in chain.layer_types for each in kind.stages if each.name == name)


def points(*pairs: tuple[float, float], attended: float = 0.0) -> list[list[float]]:
    return [[rows, us, 0.0, *([attended] if attended else [])] for rows, us in pairs]


def table(stage: str, work: tuple[Work, ...], points: list[list[float]], **more: Any) -> StageTable:
    return StageTable(stage=PriceClass(stage), work=list(work), points=points, **({"dtype": "bf16"} | more))


def tables(dtype: str = "bf16") -> dict[str, Any]:
    """One table of each kind, as a profile holds them."""
    return {
        "stages": [table("qkv_a_proj", stage("qkv_a_proj").work, points((1, 100), (64, 600)), dtype=dtype)],
        "collectives": [CollectiveTable(op="all_reduce", ranks=2, axis="inner", points=[[2048, 10], [1 << 20, 1000]])],
        "copies": [[512, 1], [1 << 20, 100]],
        "steps": [StepTable(phase="prefill", points=[[1, 2000], [64, 3000]])],
    }


def measured() -> Measured:
    return Measured(**tables())


def pricer(tables: Measured, rows: int = 64, mesh: Mesh = MESH, **options: Any) -> Pricer:
    device = replace(DEVICES["cpu-core"], name="here", measured=tables)
    shape = StepShape.of(mesh, (rows,) * mesh.num_groups, phase="prefill", context=rows)
    return Pricer(device, mesh, shape, options.pop("dtype", "bf16"), itemsize=options.pop("itemsize", 2), graph=False)


def test_a_measured_stage_costs_its_measured_time() -> None:
    proj = stage("qkv_a_proj")
    at_a_point = pricer(measured()).stage(proj, full(MESH), False, RowSet.ALL)
    assert (at_a_point.ps, at_a_point.source) == (6 * 10**8, Source.MEASURED)
    between = pricer(measured()).stage(proj, scattered(MESH), False, RowSet.ALL)
    assert 1e8 < between.ps < 6e8 and between.source is Source.INTERPOLATED
    beyond = pricer(measured(), rows=640).stage(proj, full(MESH), False, RowSet.ALL)
    assert beyond.ps == 6 * 10**9 and beyond.source is Source.SCALED


def test_one_row_costs_less_when_other_ranks_have_none() -> None:
    """One row: on every rank, or on one of two."""
    proj = stage("qkv_a_proj")
    found = table("qkv_a_proj", proj.work, points((0.5, 100), (1, 200), (2, 200)))
    prices = pricer(Measured(stages=[found]), rows=1)
    assert prices.stage(proj, full(MESH), False, RowSet.ALL).ps == 2 * 10**8
    assert prices.stage(proj, scattered(MESH), False, RowSet.ALL).ps == 10**8


def test_only_stages_of_the_same_kind_are_scaled_from_the_nearest_size() -> None:
    proj = stage("qkv_a_proj")
    (gemm,) = proj.work
    assert isinstance(gemm, Gemm)
    twice = replace(proj, work=(replace(gemm, n=2 * gemm.n),))
    prices = pricer(measured(), rows=4096)
    one, two = (prices.stage(each, full(MESH), False, RowSet.ALL) for each in (proj, twice))
    assert 1.8 < two.ps / one.ps < 2.1 and two.source is Source.SCALED
    plain = pricer(Measured(), rows=4096)
    norm = replace(proj, work=(Norm(1024, fused=False),), price_class=PriceClass.NORM)
    assert prices.stage(norm, full(MESH), False, RowSet.ALL) == plain.stage(norm, full(MESH), False, RowSet.ALL)


def test_a_stage_of_another_dtype_is_scaled_by_rooflines() -> None:
    proj, norm = stage("qkv_a_proj"), stage("input_norm")
    bf16 = pricer(measured(), rows=64).stage(proj, full(MESH), False, RowSet.ALL)
    int8 = pricer(measured(), rows=64, dtype="int8").stage(proj, full(MESH), False, RowSet.ALL)
    assert bf16.source is Source.MEASURED and int8.source is Source.SCALED
    assert 0.4 < int8.ps / bf16.ps < 0.7, "half the bytes, and twice the rate"
    by_norm = Measured(stages=[table("norm", norm.work, points((64, 30)))])
    (one, other) = (
        pricer(by_norm, dtype=dtype).stage(norm, full(MESH), True, RowSet.ALL) for dtype in ("bf16", "int8")
    )
    assert one.ps == other.ps == 3 * 10**7, "whose weights are not rounded"
    wide = pricer(by_norm, dtype="fp32", itemsize=4).stage(norm, full(MESH), True, RowSet.ALL)
    assert 1.2 < wide.ps / one.ps <= 2, "twice the bytes, and a launch"
    unknown = Measured(stages=[table("norm", norm.work, points((64, 30)), dtype="fp8")])
    assert pricer(unknown).stage(norm, full(MESH), True, RowSet.ALL).source is Source.ROOFLINE, "no fp8 on this device"


def test_attention_is_interpolated_in_rows_and_attended_tokens() -> None:
    attention = stage("attention")
    lines = points((8, 1000), (32, 3000), attended=10.0) + points((8, 2000), (32, 7000), attended=110.0)
    found = Measured(stages=[table("attention", attention.work, lines, phase="prefill")])
    args = ("attention", attention.work, "bf16")
    assert found.stage(*args, 8, "prefill", 110.0).seconds == 2e-3  # type: ignore[union-attr]
    middle = found.stage(*args, 32, "prefill", 60.0)
    assert middle is not None and middle.seconds == pytest.approx(5e-3) and middle.source is Source.INTERPOLATED
    inside = found.stage(*args, 16, "prefill", 60.0)
    assert inside is not None and inside.seconds == pytest.approx((1.5e-3 * 5e-3) ** 0.5)
    outside = found.stage(*args, 32, "prefill", 210.0)
    assert outside is not None and outside.seconds == pytest.approx(11e-3) and outside.source is Source.SCALED
    assert found.stage(*args, 32, "decode", 60.0) is None


@given(st.integers(1, 5000), st.floats(0, 9000))
def test_more_rows_and_more_context_never_cost_less(rows: int, attended: float) -> None:
    work = stage("attention").work
    lines = points((1, 100), (64, 2000), attended=64.0) + points((1, 300), (64, 9000), attended=1024.0)
    found = Measured(stages=[table("attention", work, lines, phase="decode")])
    price, more_rows, more_context = (
        found.stage("attention", work, "bf16", r, "decode", a)
        for r, a in ((rows, attended), (rows + 1, attended), (rows, attended + 10))
    )
    assert price is not None and more_rows is not None and more_context is not None
    assert 0 < price.seconds <= more_rows.seconds * (1 + 1e-9) and price.seconds <= more_context.seconds


def test_each_phase_has_its_own_prices_and_extends_with_the_other_phase() -> None:
    norm = stage("input_norm")
    prefill = table("norm", norm.work, points((1, 9000), (8, 9000), (64, 10_000)), phase="prefill")
    decode = table("norm", norm.work, points((1, 1000), (8, 2000)), phase="decode")
    of_stage = ("norm", norm.work, "bf16")
    both = Measured(stages=(prefill, decode))
    found = [both.stage(*of_stage, rows, phase, 0.0) for phase in ("prefill", "decode") for rows in (1, 8, 64)]
    assert [price and price.seconds for price in found] == [9e-3, 9e-3, 1e-2, 1e-3, 2e-3, 1e-2]
    alone = Measured(stages=(prefill,)).stage(*of_stage, 1, "decode", 0.0)
    assert alone is not None and alone.seconds == 9e-3, "the other phase's, where there is nothing else"
    one = CollectiveTable(op="all_reduce", ranks=2, phase="decode", points=[[1024, 10], [2048, 20]])
    other = CollectiveTable(op="all_reduce", ranks=2, phase="prefill", points=[[1024, 50], [4096, 90]])
    exchanges = Measured(collectives=[one, other])
    moved = [
        exchanges.collective("all_reduce", 2, "inner", n, phase)
        for phase, n in (("decode", 1024), ("decode", 4096), ("prefill", 1024), ("prefill", 4096))
    ]
    assert [price and price.seconds for price in moved] == [1e-5, 9e-5, 5e-5, 9e-5]


def test_collectives_are_priced_by_group_size_and_axis() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    given = ((2, "inner", 1000), (2, "outer", 2000), (4, "inner", 3000))
    found = [
        CollectiveTable(op="reduce_scatter", ranks=ranks, axis=axis, points=[[1, us], [1 << 30, us]])
        for ranks, axis, us in given
    ]
    prices = pricer(Measured(collectives=found), mesh=mesh)
    world = {str(move): prices.move(move, 2048, RowSet.ALL).ps for move in moves_from(mesh, owed(mesh))}
    assert world["reduce_scatter over dp: (P,P) -> (S,P)"] == 2 * 10**9
    assert world["reduce_scatter over dp x tp: (P,P) -> (S,S)"] == 3 * 10**9
    (over_tp,) = (move for move in moves_from(mesh, owed(mesh, 1)) if move.kind == "reduce_scatter")
    assert prices.move(over_tp, 2048, RowSet.ALL).ps == 10**9


def test_a_joined_addend_is_in_the_price_of_its_collective() -> None:
    prices = pricer(measured(), rows=4096)
    joined = prices.add(scattered(MESH), 2048, RowSet.ALL, joins=True)
    added = prices.add(scattered(MESH), 2048, RowSet.ALL, joins=False)
    assert joined.ps == 10**6 and added.ps > 100 * joined.ps


def test_a_plan_has_the_cost_of_its_step_outside_the_plan() -> None:
    device = replace(DEVICES["cpu-core"], name="here", measured=measured())
    deployment = Deployment(config=CONFIG, mesh=MESH, device=device, graph=False)
    shape = StepShape.of(MESH, (64,), phase="prefill", context=64)
    plan = Planner(deployment, choose_sharding(deployment, [(shape, 1.0)])).plan(shape)
    assert plan.host_overhead.ps == 3 * 10**9 and plan.totals()[PriceClass.HOST] == pytest.approx(3e-3)
    assert plan.ps == plan.host_overhead.ps + sum(op.ps for _, op in plan.ops())
    assert sum(plan.totals().values()) == pytest.approx(plan.seconds)


def a_profile(dtype: str = "bf16", made: dict[str, Any] | None = None, **fits: Any) -> Profile:
    return Profile(
        name="mine",
        title="two cores",
        fits=replace(this_machine(ranks=2, threads=1, world="shm"), **fits),
        made={"date": "2026-11-27", "models": ["dsv3-mini"]} | (made or {}),
        device=DeviceFigures(tflops_bf16=0.5),
        **tables(dtype),
    )


def planned(name: str, ranks: int = 2, **more: Any) -> tuple[Device, list[str]]:
    return choose_device(name, lambda: this_machine(ranks=ranks, threads=1, world=""), runs=False, **more)


def running(name: str = "auto", **more: Any) -> tuple[Device, list[str]]:
    return choose_device(name, lambda: this_machine(ranks=2, threads=1, world="shm"), runs=True, **more)


def test_a_written_profile_reads_back_equal(tmp_path: Path) -> None:
    profile, path = a_profile(), tmp_path / "folder" / "mine.json"
    write_profile(path, profile)
    assert read_profile(path) == profile
    again = tmp_path / "again.json"
    write_profile(again, read_profile(path))
    assert again.read_text() == path.read_text()
    assert '"points": [[2048, 10.0], [1048576, 1000.0]]' in path.read_text(), "sizes without a point"
    document = json.loads(path.read_text())
    assert document["device"] == {"like": "cpu-core", "tflops_bf16": 0.5}
    assert document["fits"]["ranks"] == 2 and "card" not in document["fits"], "what is left open is not there"
    assert document["stages"][0]["work"][0]["kind"] == "gemm"
    assert document["stages"][0]["points"] == [[1, 100.0, 0.0], [64, 600.0, 0.0]]


def test_plans_and_engines_find_the_same_device(tmp_path: Path) -> None:
    """The tables that a device is priced by are those of the file, not copies."""
    path = tmp_path / "mine.json"
    write_profile(path, a_profile())
    for door in (planned, running):
        device, notes = door(str(path))
        assert device.measured is not None and device.tflops_bf16 == 0.5 and notes[0].startswith("prices: the profile")
        assert door("h100") == (DEVICES["h100"], [])
        with pytest.raises(ConfigError, match="unknown device 'h1000'"):
            door("h1000")
    profile = read_profile(path)
    assert profile.device.measured is not None and profile.device.measured.stages is profile.stages


def never() -> MachineFingerprint:
    raise AssertionError("a named device holds wherever it is asked for")


def test_a_named_device_reads_nothing_of_this_machine() -> None:
    assert choose_device("h20", never, runs=True) == choose_device("h20", never, runs=False) == (DEVICES["h20"], [])


def test_a_profile_fits_only_its_own_machine() -> None:
    mine = this_machine(ranks=2, threads=1, world="shm")
    assert not mine.misfit(mine) and not MachineFingerprint(ranks=2).misfit(mine)
    assert "cpu 'another' there" in MachineFingerprint(cpu="another").misfit(mine)
    assert (
        mine.misfit(replace(mine, threads=2, torch="1"))
        == f"threads 1 there, 2 here; torch {mine.torch!r} there, '1' here"
    )


def test_a_profile_of_two_hosts_is_not_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(tmp_path))
    two = this_machine(ranks=2, threads=1, world="shm+gloo", hosts=2)
    kept(tmp_path, "two.json", world="shm+gloo", hosts=2)
    file = str(tmp_path / "two.json")
    assert choose_device("auto", lambda: two, runs=True, model="dsv3-mini")[1] == [
        "prices: the profile two.json, made 2026-11-01"
    ]
    assert planned(file)[1][1:] == [f"the profile {file} is not of this machine: hosts 2 there, 1 here"]
    with pytest.raises(ConfigError, match=r"hosts 2 there, 1 here.*narrows calibrate --num-ranks 2 --out"):
        running(file, dtype="bf16")
    kept(tmp_path, "one.json")
    with pytest.raises(
        ConfigError, match=r"hosts 1 there, 2 here.*narrows calibrate --num-ranks 2 --nnodes 2 \(on each"
    ):
        choose_device(str(tmp_path / "one.json"), lambda: two, runs=True, dtype="bf16")


def kept(folder: Path, name: str, dtype: str = "bf16", models: tuple[str, ...] = ("dsv3-mini",), **fits: Any) -> None:
    made = {"date": f"2026-11-{len(list(folder.iterdir())) + 1:02}", "models": list(models)}
    write_profile(folder / name, a_profile(dtype, made, **fits))


def test_profiles_of_the_dtype_and_then_of_the_model_are_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(tmp_path))

    def taken(dtype: str, model: str = "dsv3-mini") -> str:
        (note,) = running(dtype=dtype, model=model)[1]
        return note

    kept(tmp_path, "threads.json", world="threads")
    assert running()[0] == DEVICES["cpu-core"], "no profile fits"
    assert taken("bf16") == (
        "the profile threads.json is not used: world 'threads' there, 'shm' here; "
        "make a new one with: narrows calibrate --num-ranks 2"
    )
    kept(tmp_path, "b-int8.json", "int8")
    scaled = "prices: the profile b-int8.json, made 2026-11-02; it measured int8, by which bf16 is scaled"
    assert taken("bf16") == f"{scaled}; narrows calibrate --num-ranks 2 measures it"
    who_plans = planned("auto", dtype="bf16", model="dsv3-mini")[1]
    assert who_plans == ["prices: the profile threads.json, made 2026-11-01"], "however its ranks exchange"
    empty = a_profile().model_copy(update={"stages": [], "collectives": [], "copies": [], "steps": []})
    write_profile(tmp_path / "z-empty.json", empty)
    assert "b-int8.json" in taken("bf16"), "one without stages measured nothing"
    (tmp_path / "z-empty.json").write_text('{"narrows_profile": 1, "fits": {"ranks": 9}, "device": {"tflops_fp8": 1}}')
    kept(tmp_path, "a.json")
    assert taken("bf16") == "prices: the profile a.json, made 2026-11-04"
    assert "b-int8.json" in taken("int8")
    kept(tmp_path, "c.json", models=("/some/where/other",))
    assert "a.json" in taken("bf16"), "made with the model, though not the newest"
    assert "c.json" in taken("bf16", "/else/where/other")
    assert "c.json" in taken("bf16", "unheard-of"), "the newest"
    assert planned("auto", dtype="int8", model="dsv3-mini")[1][0].startswith("prices: the profile b-int8.json")
    with pytest.raises(
        ConfigError, match=r"no profile of this machine for 3 rank\(s\).*calibrate --num-ranks 3, or name"
    ):
        planned("auto", 3)


def test_plans_by_a_profile_of_another_machine_or_version_print_a_note(tmp_path: Path) -> None:
    write_profile(tmp_path / "mine.json", a_profile(ranks=8, world="gloo"))
    file = str(tmp_path / "mine.json")
    assert planned(file)[1] == [f"prices: the profile {file}, made 2026-11-27"]
    with pytest.raises(ConfigError, match=r"made for something else \(ranks 8 there, 2 here; .*--out .*mine.json"):
        running(file, dtype="bf16")
    write_profile(tmp_path / "mine.json", a_profile(cpu="an abacus", narrows="0.0.7"))
    (_, other) = planned(file, dtype="bf16")[1]
    assert other.startswith(f"the profile {file} is not of this machine: cpu 'an abacus' there") and "0.0.7" in other


def test_every_figure_of_a_device_may_be_given() -> None:
    others = {"name", "title", "sources", "notes", "collectives", "gemm", "kernels", "measured"}
    assert set(DeviceFigures.model_fields) - {"like"} == {each.name for each in fields(Device)} - others


def test_missing_peaks_are_scaled_from_the_given_one(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({"narrows_profile": 1, "device": {"like": "cpu-core", "tflops_bf16": 0.22}}))
    device = planned(str(path))[0]
    assert device.tflops_int8 == pytest.approx(0.44) and device.tflops_fp32 == pytest.approx(0.03)
    assert device.tflops_fp8 is None
    path.write_text(json.dumps({"narrows_profile": 1, "device": {"tflops_bf16": 0.22, "tflops_int8": None}}))
    assert planned(str(path))[0].tflops_int8 is None


def test_a_hand_written_profile_needs_little(tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    path.write_text(
        json.dumps(
            {
                "narrows_profile": 1,
                "device": {"like": "h100", "hbm_bytes_per_s": 3.0e12},
                "collectives": [{"op": "all_reduce", "ranks": 8, "points": [[1024, 10], [1048576, 30]]}],
            }
        )
    )
    device = read_profile(path).device
    assert (device.name, device.tflops_bf16, device.hbm_bytes_per_s) == ("lab", 989, 3.0e12)
    assert device.measured is not None and device.measured.collective("all_reduce", 8, "inner", 1024).seconds == 1e-5  # type: ignore[union-attr]


A_GEMM = {"kind": "gemm", "n": 960, "k": 1024}
A_REDUCE = {"op": "all_reduce", "ranks": 2, "points": [[1, 1], [2, 2]]}


def a_stage(**change: Any) -> dict[str, Any]:
    return {"stage": "qkv_a_proj", "dtype": "bf16", "work": [A_GEMM], "points": [[1, 10]]} | change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"narrows_profile": 99}, "a profile of version 99, and this narrows reads version 1"),
        ({"narrows_profile": None, "x": 1}, "version None"),
        ({"narrows_profile": "1"}, "version '1'"),
        ({"colectives": []}, "colectives: there is no such field"),
        ({"device": {"like": "h1000"}}, "device.like: input should be 'h20', 'h20-3e'"),
        ({"device": "h20"}, "device: input should be an object, not 'h20'"),
        ({"device": {"tflops": 1}}, "device.tflops: there is no such field"),
        ({"device": {"tflops_bf16": "fast"}}, "device.tflops_bf16: input should be a valid number, not 'fast'"),
        ({"device": {"tflops_bf16": None}}, "device.tflops_bf16: input should be a valid number, not None"),
        ({"device": {"tflops_bf16": 0}}, "device.tflops_bf16: input should be greater than 0, not 0"),
        ({"device": {"hbm_bytes_per_s": math.nan}}, "device.hbm_bytes_per_s: input should be a finite number, not nan"),
        ({"device": {"launch_s": -1}}, "device.launch_s: input should be greater than or equal to 0, not -1"),
        ({"device": {"gemm_efficiency": 5}}, "device.gemm_efficiency: input should be less than or equal to 1"),
        ({"device": {"memory_bytes": True}}, "device.memory_bytes: input should be a valid number, not True"),
        ({"device": {"num_links": 0}}, "device.num_links: input should be greater than or equal to 1"),
        ({"fits": {"moon": "full"}}, "fits.moon: there is no such field"),
        ({"fits": {"ranks": "2"}}, "fits.ranks: input should be a valid integer, not '2'"),
        ({"stages": [{"stage": "sorcery", "points": []}]}, "stages.0.stage: input should be 'embed', 'qkv_a_proj'"),
        ({"stages": [7]}, "stages.0: input should be an object, not 7"),
        ({"stages": [a_stage(points=[])]}, "stages.0.points: list should have at least 1 item"),
        ({"stages": [a_stage(points=[[0, 1]])]}, "stages.0.points: the point [0.0, 1.0] has a size or a time of 0"),
        ({"stages": [a_stage(points=[[1, math.inf]])]}, "stages.0.points.0.1: input should be a finite number"),
        ({"stages": [a_stage(points=[[1, 2], [1, 3]])]}, "stages.0.points: there are two points at 1"),
        ({"stages": [a_stage(work=[])]}, "stages.0.work: list should have at least 1 item"),
        ({"stages": [a_stage(work=["..."])]}, "stages.0.work.0: input should be an object, not '...'"),
        ({"stages": [a_stage(work=[{"kind": "magic"}])]}, "stages.0.work.0: input tag 'magic' found using 'kind'"),
        ({"stages": [a_stage(work=[A_GEMM | {"n": "960"}])]}, "stages.0.work.0.n: input should be a valid integer"),
        ({"stages": [a_stage(work=[A_GEMM | {"k": -1}])]}, "stages.0.work.0.k: input should be greater than or equal"),
        (
            {"stages": [a_stage(work=[A_GEMM | {"precision": "high"}])]},
            "stages.0.work.0.precision: input should be 'weights', 'activations' or 'float32_sums', not 'high'",
        ),
        ({"stages": [a_stage(dtype="bfloat16")]}, "stages.0.dtype: input should be 'bf16'"),
        ({"stages": [a_stage(phase="deocde")]}, "stages.0.phase: input should be 'decode' or 'prefill', not 'deocde'"),
        ({"stages": [a_stage(), a_stage()]}, "the stage qkv_a_proj has two tables of the same"),
        ({"collectives": [{"op": "gossip", "ranks": 2, "points": []}]}, "collectives.0.op: input should be 'all_re"),
        ({"collectives": [{"op": "all_reduce", "ranks": 1, "points": []}]}, "ranks: input should be greater than or"),
        ({"collectives": [{"op": "all_reduce", "ranks": 2, "points": [[1, 1]]}]}, "list should have at least 2 items"),
        ({"collectives": [{"op": "all_reduce", "ranks": 2}]}, "collectives.0.points: it is missing"),
        ({"collectives": [A_REDUCE, A_REDUCE]}, "the collective all_reduce has two tables of the same"),
        ({"copies": [[1, 1], [1, 2]]}, "copies: there are two points at 1"),
        ({"copies": [[1, -1], [2, 2]]}, "copies.0.1: input should be greater than or equal to 0, not -1"),
        ({"copies": [[1, 1]]}, "copies: two points or more are needed"),
        ({"steps": [{"phase": "dekode", "points": [[1, 1], [2, 2]]}]}, "steps.0.phase: input should be 'decode'"),
        ({"stages": 7}, "stages: input should be a valid array, not 7"),
    ],
)
def test_errors_of_profile_files(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"narrows_profile": 1} | change))
    with pytest.raises(ConfigError) as error:
        read_profile(path)
    assert said in str(error.value) and "bad.json" in str(error.value) and "\n" not in str(error.value)


def test_the_example_of_the_page_is_a_profile() -> None:
    page = Path(__file__).parents[2] / "docs" / "profiles.md"
    example = re.search(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    assert {each.stage for each in Profile.model_validate_json(example[1]).stages} == {"qkv_a_proj", "attention"}


def test_files_that_are_no_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "nowhere.json")
    for text, said in (("{", "is not JSON"), ("[]", "is not a profile"), ("{}", "make one with: narrows calibrate")):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_profile(path)
