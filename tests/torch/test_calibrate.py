"""`narrows calibrate` on small ranks: its profile is used where it fits, refused elsewhere, and named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.arch.stages import PriceClass
from narrows.cli import calibrate_command
from narrows.cli.main import main
from narrows.cost.profile import DeviceFigures, read_profile, write_profile
from narrows.engine.config import EngineConfig, resolve
from narrows.errors import ConfigError
from narrows.native import why_absent
from narrows.ranks import affinity

OPTIONS = ["--num-ranks", "2", "--transport", "threads", "--quick", "--dtype", "float32", "--seconds", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the one profile that all tests here look at."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module", autouse=True)
def smaller_probes() -> Iterator[None]:
    """An eighth of the product, a quarter of the reading: long enough to tell the machine's pace by."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("probe", "rates"):
            patch.setattr(f"narrows.calibrate.{module}.GEMM_SHAPE", (1024, 2048, 1024))
        patch.setattr("narrows.calibrate.rates._READ", 64 << 20)
        yield


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    file = folder / "mine.json"
    assert main(["calibrate", "narrows-demo", *OPTIONS, "--out", str(file)]) == 0
    return file


def config_for(**options: object) -> EngineConfig:
    return EngineConfig(model="narrows-demo", **{"tp": 2, "dtype": "float32", **options})  # type: ignore[arg-type]


def test_every_stage_of_every_mesh_and_sharding_is_measured(profile: Path) -> None:
    measured = read_profile(profile).device.measured
    assert measured is not None and measured.num_ranks == 2
    classes = {stage.stage for stage in measured.stages}
    assert classes == {*PriceClass} - {PriceClass.ADD, PriceClass.COMMUNICATION, PriceClass.HOST}
    heads = {item.heads for stage in measured.stages for item in stage.work if hasattr(item, "heads")}
    assert len(heads) == 2, "attention of dp 1 x tp 2 and of dp 2 x tp 1"
    assert {stage.phase for stage in measured.stages if stage.stage == "attention"} == {"prefill", "decode"}
    ops = {(each.op, each.ranks) for each in measured.collectives}
    assert ops >= {("all_reduce", 2), ("reduce_scatter", 2), ("all_gather", 2), ("column_gather", 2)}
    assert {each.phase for each in measured.steps} == {"prefill", "decode"}
    us = [row[1] for stage in measured.stages for row in stage.points]
    assert min(us) > 0 and max(us) < 10e6
    products = [stage.points for stage in measured.stages if stage.stage in ("mlp", "experts")]
    assert all(points[-1][0] >= 64 for points in products)
    # Together: on a busy machine, any one of them may have its few rows at a bad moment.
    assert sum(points[-1][1] for points in products) > sum(points[0][1] for points in products)


def test_an_engine_uses_a_fitting_profile_and_logs_it(
    profile: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(folder))
    resolved = resolve(config_for())
    assert resolved.deployment.device.measured is not None
    assert any(note.startswith("prices: the profile mine.json, made 20") for note in resolved.notes)
    assert resolve(config_for(tp=1)).deployment.device.name == "cpu-core", "of another number of ranks"
    assert resolve(config_for(device="cpu-core")).deployment.device.name == "cpu-core", "chosen by name"
    alone = resolve(config_for(threads=2))
    assert alone.deployment.device.name == "cpu-core"
    assert any(
        "mine.json is not used: threads 1 there, 2 here; make a new one with: narrows calibrate" in note
        for note in alone.notes
    )


def test_plan_takes_the_profile_of_as_many_ranks(
    profile: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(folder))
    options = ["plan", "narrows-demo", "--rows", "64", "--context", "64", "--dtype", "fp32", "--json"]
    assert main([*options, "--tp", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layouts"][0]["totals_ms"]["host"] > 0
    assert any(note.startswith("prices: the profile mine.json, made") for note in document["notes"])
    assert main([*options, "--tp", "4"]) == 2
    assert "make one with: narrows calibrate --num-ranks 4" in capsys.readouterr().err


def test_a_file_that_does_not_fit_is_refused(profile: Path, tmp_path: Path) -> None:
    assert resolve(config_for(device=str(profile))).deployment.device.measured is not None
    with pytest.raises(
        ConfigError, match=r"ranks 2 there, 4 here.*narrows calibrate --num-ranks 4 .*--transport threads"
    ):
        resolve(config_for(tp=4, device=str(profile)))
    read = read_profile(profile)
    for change, said in (
        ({"cpu": "an abacus"}, "cpu 'an abacus' there"),
        ({"torch": "0.1"}, "torch '0.1' there"),
        ({"narrows": "0.0.1"}, "narrows '0.0.1' there"),
        ({"compiled_code": "beef"}, "compiled code 'beef' there"),
    ):
        other = tmp_path / "other.json"
        write_profile(other, read.model_copy(update={"fits": replace(read.fits, **change)}))
        with pytest.raises(ConfigError, match=said):
            resolve(config_for(device=str(other)))


def test_plans_of_the_measured_model_rest_on_measured_prices(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", str(profile), "--tp", "2", "--dtype", "fp32", "--eager", "--context", "64", "--json"]
    assert main(["plan", "narrows-demo", "--rows", "64", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    for layout in document["layouts"]:
        sources = {step["source"] for step in layout["ops"] if step["us"]}
        assert sources <= {"measured", "interpolated", "scaled"}, layout["name"]
    assert document["layouts"][0]["totals_ms"]["host"] > 0
    assert main(["plan", "narrows-demo", "--rows", "64", *options[:2], *options[4:]]) == 0
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if note.startswith("the profile")]
    assert "is of 2 rank(s), the mesh has 1" in note


def test_bench_layout_prints_the_machines_pace_against_the_profile(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = read_profile(profile)
    fast = read.figures.given() | {"like": read.figures.like, "tflops_fp32": 100 * read.device.tflops_fp32}
    write_profile(tmp_path / "fast.json", read.model_copy(update={"figures": DeviceFigures(**fast)}))
    grid = ["--rows", "4", "--phase", "decode", "--context", "8", "--seconds-per-cell", "0", "--layout", "all-reduce"]
    paces = []
    for file in (profile, tmp_path / "fast.json"):
        options = ["--tp", "2", "--dtype", "float32", "--device", str(file)]
        assert main(["bench", "layout", "narrows-demo", *options, *grid, "--json"]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        (pace,) = [note for note in notes if note.startswith("pace: ")]
        paces.append([int(found) for found in re.findall(r"at (\d+)%", pace)])
    (own, reads), (other, _) = paces
    assert own > 0 and reads > 0
    assert other < own / 2, "a hundred times the rate is far from that pace, whatever else runs here"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-ranks", "0"], "--num-ranks is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--seconds", "0"], "--seconds is 0; it must be more than 0"),
        (["no-such-model", "--transport", "threads"], "no-such-model"),
        (["--num-ranks", "1000"], "--num-ranks 1000 on "),
        (["--dtype", "float8", "--transport", "threads"], "dtype 'float8' is not known"),
        (["--transport", "pigeons"], "invalid choice: 'pigeons'"),
        pytest.param(
            ["--transport", "gloo"],
            "--transport gloo is not available here: ranks exchange through shm",
            marks=pytest.mark.skipif(bool(why_absent()), reason="gloo can be had without compiled code"),
        ),
    ],
)
def test_impossible_calibrations_are_a_one_line_error(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("options", "num_ranks"),
    [([], 6), (["--threads", "2"], 3), (["--transport", "nccl"], 4), (["--transport", "nccl", "--threads", "2"], 4)],
)
def test_the_default_is_a_rank_for_each_core_or_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], num_ranks: int
) -> None:
    def end_here(**found: object) -> None:
        raise ConfigError(f"as far as {found['num_ranks']} ranks on {found['run_on']}")

    monkeypatch.setattr(affinity, "num_gpus", lambda: 4)
    monkeypatch.setattr(affinity, "num_cores", lambda: 6)
    monkeypatch.setattr(calibrate_command, "rank_fingerprint", end_here)
    assert main(["calibrate", *options]) == 2
    where = "cuda" if "nccl" in options else "cpu"
    assert f"as far as {num_ranks} ranks on {where}" in capsys.readouterr().err
