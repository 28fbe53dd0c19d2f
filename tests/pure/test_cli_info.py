"""`narrows info`: targets and why no better one runs, versions, transports and profiles, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from documents import run_for_both

from narrows.cli.info_command import TargetLine, gpus, profiles, target_lines, transports
from narrows.cli.main import main
from narrows.cost.environment import this_machine
from narrows.cost.profile import Profile, write_profile
from narrows.native import Status, Target, status

LIBRARY = sys.modules["narrows.native.library"]
KNOWN = ("wide", "middle", "least")
COMPILED = (Target("wide", ("wide_a", "wide_b")), Target("middle", ()), Target("least", ()))


def lines(**changed: object) -> dict[str, TargetLine]:
    whole = Status(known=KNOWN, compiled=COMPILED, running="middle", why_none="", forced="")
    return {line.name: line for line in target_lines(replace(whole, **changed))}  # type: ignore[arg-type]


def test_a_target_that_cannot_run_names_the_features_that_are_missing() -> None:
    found = lines()
    assert list(found) == list(KNOWN)
    assert found["wide"].missing == ("wide_a", "wide_b") and found["wide"].why == "this CPU lacks wide_a, wide_b"
    assert (found["middle"].runs, found["middle"].why) == (True, "")
    assert (found["least"].runs, found["least"].why) == (False, "middle is better")


def test_a_forced_target_is_why_a_better_one_does_not_run() -> None:
    found = lines(running="least", forced="least")
    assert found["middle"].why == "NARROWS_TARGET=least asks for another"
    assert found["least"].runs and found["least"].why == "NARROWS_TARGET=least"


def test_where_nothing_runs_each_target_says_why() -> None:
    off = lines(running="", why_none="NARROWS_NATIVE=0")
    assert not any(line.runs for line in off.values()) and all(line.compiled for line in off.values())
    assert off["middle"].why == off["least"].why == "NARROWS_NATIVE=0" and off["wide"].why.startswith("this CPU lacks")
    impossible = lines(running="", forced="wide", why_none="NARROWS_TARGET=wide: this CPU lacks wide_a, wide_b; ...")
    assert impossible["middle"].why == "NARROWS_TARGET=wide"
    none = lines(running="", compiled=(), why_none="it was not built")
    assert list(none) == list(KNOWN) and not any(line.compiled for line in none.values())
    assert {line.why for line in none.values()} == {"not compiled: it was not built"}


def test_the_status_is_of_the_library_and_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = status()
    assert "baseline" in here.known
    if here.compiled:
        assert tuple(target.name for target in here.compiled) == here.known, "what is known is what is compiled"
    assert bool(here.running) != bool(here.why_none)
    monkeypatch.setattr(LIBRARY, "__file__", str(tmp_path / "library.py"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "targets.def").write_text("// TARGET(of a comment)\nTARGET(least, )\n")
    absent = status()
    assert absent.known == ("least",) and absent.compiled == ()


@pytest.mark.parametrize(("switch", "value"), [("NARROWS_NATIVE", "0"), ("NARROWS_TARGET", "sse9")])
def test_the_command_answers_whatever_the_environment_asks_for(switch: str, value: str) -> None:
    code = "import sys; sys.modules['torch'] = None; from narrows.cli.main import main; sys.exit(main())"
    environment = {**os.environ, switch: value}
    line = [sys.executable, "-c", code, "info", "--json"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert done.stderr == "" and found["compiled_code"]["running"] == ""
    if status().compiled:
        assert found["compiled_code"]["why_none"].startswith(f"{switch}={value}")
        assert not found["transports"][0]["possible"] and f"{switch}={value}" in found["transports"][0]["why"]


def test_tables_and_document_say_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(tmp_path))
    out, found = run_for_both(capsys, ["info"])
    assert set(found) == {
        *("narrows", "python", "torch", "extras", "compiled_code", "machine", "transports", "profiles")
    }
    assert found["narrows"] == version("narrows") and "narrows[engine]" in out
    for target in found["compiled_code"]["targets"]:
        assert any(line.startswith(target["name"]) and line.endswith(target["why"]) for line in stripped(out))
    assert f"no profiles in {tmp_path}" in out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled_code"] == found["compiled_code"], "a document, and no table"


def stripped(out: str) -> list[str]:
    return [line.rstrip() for line in out.splitlines()]


def test_a_profile_fits_or_says_what_it_was_made_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NARROWS_PROFILES", str(tmp_path))
    mine = this_machine(ranks=4, threads=2, world="threads")
    write_profile(tmp_path / "a-mine.json", Profile(name="a", fits=mine, made={"date": "2026-11-30"}))
    write_profile(tmp_path / "b-other.json", Profile(name="b", fits=replace(mine, cpu="another", card="NVIDIA X")))
    (tmp_path / "c-broken.json").write_text("{")
    fitting, other, broken = profiles("")
    assert fitting["fits"] and (fitting["ranks"], fitting["threads"], fitting["world"]) == (4, 2, "threads")
    assert not other["fits"] and "cpu 'another' there" in other["why"] and "card 'NVIDIA X' there" in other["why"]
    assert not broken["fits"] and "is not JSON" in broken["why"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "4 rank(s), 2 thread(s) each, threads, made 2026-11-30" in out and "cpu 'another' there" in out


def test_transports_need_torch_and_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWS_SHM", "0")

    def possible(torch: dict[str, str] | None, num_gpus: int) -> dict[str, str]:
        """By name, why not; empty where it is possible."""
        found = transports(torch, num_gpus)
        assert all(way["possible"] == (not way["why"]) for way in found)
        return {way["name"]: way["why"] for way in found}

    assert all("pip install 'narrows[engine]'" in why for why in possible(None, 1).values())
    cpu = possible({"version": "2.13.0+cpu", "cuda": ""}, 1)
    assert cpu["shm"] == "NARROWS_SHM=0" and not cpu["threads"] and not cpu["gloo"]
    assert cpu["nccl"] == "torch 2.13.0+cpu is a build for CPUs"
    cuda = {"version": "2.13.0", "cuda": "13.0"}
    assert possible(cuda, 0)["nccl"].startswith("no NVIDIA driver") and possible(cuda, 1)["nccl"] == ""


def test_gpus_are_those_that_the_driver_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA GB10, [N/A]'\n")
    tool.chmod(0o755)
    assert gpus() == [{"name": "NVIDIA H200", "memory_gib": 140.4}, {"name": "NVIDIA GB10", "memory_gib": None}]
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert gpus() == []
