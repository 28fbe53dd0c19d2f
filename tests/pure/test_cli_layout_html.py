"""The page of `narrows bench layout --html`, of made-up times of real plans: whole, self-contained, and to scale."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.bench.grid import Cell, PlanTimes, grid_of
from narrows.cli.layout_html import grid_page
from narrows.cost.devices import device
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts, shared_plans
from narrows.plan.planner import Deployment, Planner

CONFIG, MESH = preset("dsv3-mini"), Mesh.of(dp=1, tp=2)
PLANNER = Planner(Deployment(config=CONFIG, mesh=MESH, device=device("cpu-core"), graph=False), WeightSharding())


def cell(rows: int, phase: str, slower: float) -> Cell:
    """Every step took ``slower`` times its price."""
    shape = StepShape.of(MESH, (rows,), phase=phase, context=max(rows, 2))
    plans = shared_plans({name: PLANNER.plan(shape, name) for name in applicable_layouts(CONFIG, MESH)})
    return Cell(
        title=f"{phase} {rows}",
        phase=phase,
        rows=rows,
        context=shape.context,
        plans=tuple(
            PlanTimes(
                layouts=names,
                plan=plan,
                step_s=(slower * plan.seconds,) * 3,
                clocked_s=(tuple(slower * op.seconds for _, op in plan.ops()),),
            )
            for names, plan in plans.items()
        ),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return grid_page(grid_of([cell(1, "decode", 2.0), cell(512, "prefill", 3.0)], ["a note"]), "a title", "a machine")


def drawings(page: str) -> dict[str, ElementTree.Element]:
    found = [ElementTree.fromstring("<svg" + rest.split("</svg>")[0] + "</svg>") for rest in page.split("<svg")[1:]]
    return {drawing.attrib["aria-label"]: drawing for drawing in found}


def test_the_page_fetches_and_runs_nothing(page: str) -> None:
    for word in ("src=", "href=", "url(", "@import", "<script", "http"):
        assert word not in page
    assert "a title" in page and "a machine" in page and "a note" in page


def test_every_plan_of_every_step_is_drawn_in_both_ways_inside_its_frame(page: str) -> None:
    few, many = (cell(1, "decode", 2.0), cell(512, "prefill", 3.0))
    wanted = {
        f"{one.title}: {plan.name}, {kind}"
        for one in (few, many)
        for plan in one.plans
        for kind in ("scaled", "blocks")
    }
    found = drawings(page)
    assert wanted == set(found) - {"measured and priced time of every plan over auto's"}
    for name in wanted:
        for rect in found[name].iter("rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= float(found[name].attrib["width"])
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= float(found[name].attrib["height"])


def test_measured_bars_are_in_proportion_to_measured_time(page: str) -> None:
    drawing = drawings(page)["prefill 512: auto, scaled"]
    by_title: dict[str, list[float]] = {}
    for group in drawing.iter("g"):
        title, rect = group.find("title"), group.find("rect")
        assert title is not None and rect is not None and title.text is not None
        by_title.setdefault(title.text, []).append(float(rect.attrib["width"]) + 0.6)
    long = {title: widths for title, widths in by_title.items() if widths[0] > 5}
    assert len(long) >= 4
    for title, (priced, measured) in long.items():
        assert measured == pytest.approx(3 * priced, rel=0.01), title


def test_steps_can_be_chosen_and_the_first_is(page: str) -> None:
    assert page.count('type="radio"') == 2 and page.count(" checked>") == 1
    for at in (1, 2):
        assert f'id="at{at}"' in page and f'id="cell{at}"' in page and f"#at{at}:checked ~ main #cell{at}" in page


def test_plans_equally_far_from_their_prices_are_drawn_at_their_price(page: str) -> None:
    figure = drawings(page)["measured and priced time of every plan over auto's"]
    circles = [circle.attrib for circle in figure.iter("circle")]
    assert len(circles) == 2 * (3 + 3), "auto itself is the line"
    for measured, priced in zip(circles[::2], circles[1::2], strict=True):
        assert float(measured["cx"]) == pytest.approx(float(priced["cx"]), abs=0.02)
