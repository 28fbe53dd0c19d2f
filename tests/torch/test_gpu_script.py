"""benchmarks/gpu.py without a card: it says so, goes on after a failure, and its cases fit the ops on fake tensors."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, StepGuard, cuda_device_guard, prefixes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from narrows.cli.main import main as narrows
from narrows.ops.step_block import StepBlock

__all__ = ["cuda_device_guard", "prefixes"]

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("narrows_gpu_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@NO_CARD
@pytest.mark.parametrize("command", ["facts", "kernels", "end-to-end"])
def test_without_a_card_it_says_so_in_one_line(
    gpu: ModuleType, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([command, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing was measured: ") and "GPU" in line
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_is_named_and_the_next_runs(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = gpu.Report(tmp_path / "made" / "facts.json", time.monotonic() + 100)
    report.check("good", lambda: {"ms": 1.5})
    report.check("bad", lambda: 1 / 0)
    report.check("after it", lambda: {"ms": 2.5})
    report.check("too long", lambda: {"ms": 3.5}, least_s=1000)
    assert report.failed == ["bad", "too long"] and report.end() == 1
    written = json.loads(report.file.read_text(encoding="utf-8"))
    assert written["good"] == {"ms": 1.5} and written["after it"] == {"ms": 2.5}
    assert "ZeroDivisionError" in written["bad"]["failed"] and "no time was left" in written["too long"]["failed"]
    assert "failed: bad, too long" in capsys.readouterr().out.splitlines()[-1]
    good = gpu.Report(tmp_path / "good.json", time.monotonic() + 100)
    good.check("good", lambda: {})
    assert good.end() == 0


def run_all(gpu: ModuleType, command: str, patch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """A command on fake tensors, which nothing is timed of."""

    def captured(call: Callable[[], Tensor]) -> tuple[Any, Callable[[], Tensor]]:
        with StepGuard() as guard:
            guard.stage = "captured"  # nothing may wait for the card
            found = call()

        class Graph:
            def replay(self) -> None:
                pass

        return Graph(), lambda: found

    def milliseconds(call: Callable[[], object], rounds: int = 20) -> float:
        call()
        return 2.0

    def distance(got: Tensor, want: Tensor) -> float:
        assert got.shape == want.shape
        return 0.0

    patch.setattr(gpu, "captured", captured)
    patch.setattr(gpu, "milliseconds", milliseconds)
    patch.setattr(gpu, "distance", distance)
    patch.setattr(gpu, "drawn", lambda *shape, scale=1.0: torch.empty(shape, dtype=torch.bfloat16, device="cuda:0"))
    for name in ("mla_attention_reference", "gqa_attention_reference"):  # they read lengths
        op = getattr(gpu, name.removesuffix("_reference"))
        patch.setattr(gpu, name, op)
    report = gpu.Report(folder / f"{command}.json", time.monotonic() + 1000)
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        getattr(gpu, command)(report)
    return report.results


def test_the_cases_of_kernels_fit_their_ops(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "StepBlock", lambda device: StepBlock(CUDA))  # there is no current device
    results = run_all(gpu, "kernels", monkeypatch, tmp_path)
    assert len(results) == len(gpu.cases()) == 32
    assert [name for name, found in results.items() if "failed" in found] == []
    for name, found in results.items():
        assert found["ms"] == 2.0 and 0 < found["floor_ms"] < 10, name
    facts = {"ceilings": {"copied_bytes_per_s": 4.3e11, "flops": 7.9e13, "other": 1}}
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    slower = run_all(gpu, "kernels", monkeypatch, tmp_path)
    for name, found in slower.items():
        assert found["floor_ms"] == pytest.approx(10 * results[name]["floor_ms"]), name


@NO_CARD
def test_the_commands_of_end_to_end_are_narrows(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is read by the command line, which then misses the card."""
    for model in gpu.MODELS:
        line = gpu.latency_line(model, 100.0)
        assert line[1:3] == ["-m", "narrows"]
        assert narrows(line[3:]) != 0
        assert "--run-on cuda needs an NVIDIA GPU" in capsys.readouterr().err
