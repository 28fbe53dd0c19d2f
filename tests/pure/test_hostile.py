"""benchmarks/hostile.py: each bound holds at its value and breaks just beyond it, and no other machine is attacked."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def hostile() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("hostile", BENCHMARKS / "hostile.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "hostile", script)  # dataclasses look their module up
        spec.loader.exec_module(script)
        yield script


@pytest.fixture
def well(hostile: ModuleType) -> Any:
    """Figures exactly at every bound."""
    return hostile.Figures(
        name="a",
        seen=hostile.Seen(health=0.5, gap=0.375, first=5.0),
        gap_alone=0.125,
        before_mb=100.0,
        peak_mb=900.0,
        after_mb=200.0,
        restarts=0,
        calm=True,
        attack_s=1.0,
        outcomes={"400": 2},
    )


def test_figures_at_their_bounds_are_well(hostile: ModuleType, well: Any) -> None:
    assert well.wrong == []
    assert hostile.report([well], as_json=False) == 0


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("restarts", 1, "restarts"),
        ("restarts", None, "no answer"),
        ("calm", False, "not calm"),
        ("after_mb", 200.5, "memory"),
        ("gap_alone", 0.12, "gap"),
    ],
)
def test_each_bound_fails_alone(hostile: ModuleType, well: Any, field: str, value: object, wrong: str) -> None:
    broken = replace(well, **{field: value})
    assert broken.wrong == [wrong]
    assert hostile.report([well, broken, well], as_json=False) == 1


@pytest.mark.parametrize(("field", "value"), [("health", 0.501), ("gap", 0.376), ("first", 5.01)])
def test_each_time_limit_fails_alone(
    hostile: ModuleType, well: Any, field: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(well, seen=replace(well.seen, **{field: value}))
    assert hostile.report([well, broken], as_json=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert [row["wrong"] for row in document["attacks"]] == [[], [field]]


def test_attacks_have_distinct_names_and_descriptions(hostile: ModuleType) -> None:
    names = [hostile.name_of(attack) for attack in hostile.ATTACKS]
    assert len({*names}) == len(names) >= 60
    assert all(attack.__doc__ and "\n" not in attack.__doc__ for attack in hostile.ATTACKS)


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "http://example.org", "http://127.0.0.1.example.org"])
def test_other_machines_are_not_attacked(hostile: ModuleType, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hostile.py", "--url", url, "--pid", "1"])
    monkeypatch.setattr(hostile, "run", lambda attacks, args: [])  # without the check no request is sent
    with pytest.raises(SystemExit) as ended:
        hostile.main()
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("ends", "figure"),
    [
        (["begin", "event"], "first"),
        (["begin", "event", "event"], "gap"),
        (["begin", "event", "broken", "event"], "gap"),
    ],
)
def test_silence_is_a_gap_once_a_stream_speaks(
    hostile: ModuleType, monkeypatch: pytest.MonkeyPatch, ends: list[str], figure: str
) -> None:
    clock = [0.0]
    watch = sys.modules["hostile_load.watch"]
    monkeypatch.setattr(watch, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    seen = hostile.Seen()
    silence = watch._Silence(seen)
    for step, name in enumerate(ends):
        clock[0] += 10.0 if step == len(ends) - 1 else 1.0
        getattr(silence, name)()
    least = 11.0 if "broken" in ends else 10.0
    assert getattr(seen, figure) == least
