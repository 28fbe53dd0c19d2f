"""The example that needs no torch, run as a reader runs it; and the names of `from narrows import ...`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import narrows
from narrows import ConfigError, PlanReport, plan_step

ROOT = Path(__file__).parents[2]


def python(*command: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python as on a machine on which the package ``without`` is not installed."""
    code = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501
    line = [sys.executable, "-c", code, *command] if without else [sys.executable, *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_planning_example_runs_without_torch() -> None:
    done = python("examples/plan_layouts.py", without="torch")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if " ms, of which " in line]
    assert [row[0] for row in rows][-1] == "auto" and len(rows) == 5
    assert min(rows, key=lambda row: float(row[1]))[0] == "auto", "the cheapest"
    assert "all-reduce costs" in done.stdout


def test_a_plan_from_python_is_the_one_of_the_command() -> None:
    report = plan_step("narrows-demo", device="cpu-core", tp=2, rows=64, context=64, layouts=["all-reduce"])
    assert isinstance(report, PlanReport)
    assert [entry.plan.layout_name for entry in report.entries] == ["all-reduce"]
    assert report.shape.group_rows == (64,) and report.auto.plan.seconds <= report.entries[0].plan.seconds
    assert plan_step("narrows-demo", device="cpu-core", dp=2, rows=(5, 0), context=64).shape.group_rows == (5, 0)
    with pytest.raises(ConfigError, match="a step has at least 1 row"):
        plan_step("narrows-demo", device="cpu-core", rows=0)


def test_importing_narrows_imports_nothing_else() -> None:
    done = python("-c", "import narrows, sys; print(sorted(m for m in sys.modules if m.startswith('narrows')))")
    assert done.stdout == "['narrows']\n"


def test_every_public_name_exists_in_narrows() -> None:
    import_all = "from narrows import *; import narrows; assert all(name in globals() for name in narrows.__all__)"
    assert sorted(narrows.__all__, key=str.lower) == sorted(narrows._MODULES, key=str.lower)
    assert narrows.SamplingParams.__module__ == "narrows.sched.sampling"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        narrows.nothing  # noqa: B018
    done = python("-c", f"import sys; sys.modules['torch'] = None; {import_all}")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: narrows.LLM needs torch, which is not installed: pip install 'narrows[engine]'"
    )
