"""docs/layouts.md equals the output of benchmarks/layouts_page.py, so no figure is older than the prices."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.layout import Mesh
from narrows.plan.planner import Deployment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layouts_page", ROOT / "benchmarks" / "layouts_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the names in annotations
    spec.loader.exec_module(module)
    return module


KEPT = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
STALE = "run: python benchmarks/layouts_page.py > docs/layouts.md"


@pytest.mark.slow
def test_a_section_of_the_page_is_up_to_date(script: ModuleType) -> None:
    """Prices that change, change them all."""
    assert "\n".join((script.HEAD, *script.section(*script.ON[0]))) + "\n" in KEPT, STALE


@pytest.mark.full
def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.page() == KEPT, STALE


def test_a_model_that_does_not_fit_is_named_with_its_size(script: ModuleType) -> None:
    """V3's FP8 weights take more of a rank than a card of 80 GB has, at 8 ranks."""
    lines = list(script.section("h100", "deepseek-v3", "fp8", (Mesh.of(dp=1, tp=8),)))
    d = Deployment(config=preset("deepseek-v3"), mesh=Mesh.of(dp=1, tp=8), device=device("h100"), dtype="fp8")
    weights = d.memory(WeightSharding()).weights / 1e9
    assert f"does not fit: weights {weights:.1f} GB" in lines[-1] and weights > 80
