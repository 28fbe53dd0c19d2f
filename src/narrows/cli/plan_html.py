"""A plan report as one self-contained page: each layout's usual layer as a timeline. Draws; computes no plan.

Time runs to the right, on one scale for all layouts. Above the line a rank computes, below it ranks talk; a talk's
height is the width of what crosses ranks (bytes per row), so that a narrow gather is seen to be narrow. Attention and
experts take much more time than the rest and move little between layouts: they are blocks, not to scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment

from narrows.arch.stages import PriceClass
from narrows.plan.explain import fields_words, layout_words, main_segment
from narrows.plan.plan import Plan, Step, StepKind
from narrows.plan.report import PlanReport

__all__ = ["report_page"]

_WIDTH = 1060.0
_COMPUTE = 34.0
_TALK = 62.0
_LABEL_MIN = 46.0

_COLOURS = {
    PriceClass.QKV_A_PROJ: "#4e79a7",
    PriceClass.NORM: "#59a14f",
    PriceClass.ADD: "#8cd17d",
    PriceClass.ROUTER: "#b6992d",
    PriceClass.COMMUNICATION: "#e15759",
}
_BLOCKS = (PriceClass.ATTENTION, PriceClass.MLP, PriceClass.EXPERTS)
_BLOCK_COLOUR = "#b5b1ad"
_BLOCK_WIDTH = 120.0
_OTHER = "#86bcb6"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str
    label_y: float
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    total: str
    ratio: str
    layer_us: str
    end: float
    bars: tuple[_Bar, ...]


def report_page(report: PlanReport) -> str:
    """The page, as HTML text without references to anything outside it."""
    plans = [entry.plan for entry in report.entries]
    best = min(plan.ps for plan in plans)
    scaled = [[step.ps for step in main_segment(plan).steps if not _is_block(step)] for plan in plans]
    blocks = max(sum(_is_block(step) for step in main_segment(plan).steps) for plan in plans)
    widest = max(
        (_row_bytes(step) for plan in plans for step in main_segment(plan).steps if step.move is not None), default=1.0
    )
    scale = (_WIDTH - 80 - blocks * _BLOCK_WIDTH) / max(max(map(sum, scaled)), 1)
    rows = tuple(_row(plan, best, scale, widest) for plan in plans)
    classes = [c for c in PriceClass if any(plan.totals()[c] for plan in plans)]
    totals = [(c.value, [f"{plan.totals()[c] * 1e3:.2f}" for plan in plans]) for c in classes]
    totals.append(("total", [f"{plan.seconds * 1e3:.2f}" for plan in plans]))
    deployment, shape = report.deployment, report.shape
    page = files("narrows.cli").joinpath("plan_page.html.jinja").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(page)
        .render(
            title=f"{deployment.config.name} on {deployment.mesh} of {deployment.device.title}",
            subtitle=f"{deployment.dtype}, one {shape.phase} step of {shape.rows.total} rows, context {shape.context}; "
            "predicted by narrows plan",
            key=[(c.value, _COLOURS[c]) for c in classes if c in _COLOURS],
            layer_name=main_segment(plans[0]).name,
            rows=rows,
            totals=totals,
            why=report.why,
            notes=report.notes,
            width=_WIDTH,
            height=_COMPUTE + _TALK + 6,
            middle=_COMPUTE + 2,
        )
    )


def _row(plan: Plan, best: int, scale: float, widest: float) -> _Row:
    bars: list[_Bar] = []
    x = 0.0
    segment = main_segment(plan)
    for step in segment.steps:
        width = _BLOCK_WIDTH if _is_block(step) else step.ps * scale
        if step.ps:
            bars.append(_bar(plan, step, x, width, widest))
        x += width
    return _Row(
        name=plan.layout_name,
        total=f"{plan.seconds * 1e3:.1f}",
        ratio="" if plan.ps == best else f"{plan.ps / best:.3f} times",
        layer_us=f"{sum(step.ps for step in segment.steps) / 1e6:.0f}",
        end=round(x + 6, 2),
        bars=tuple(bars),
    )


def _is_block(step: Step) -> bool:
    return step.kind is StepKind.STAGE and step.price_class in _BLOCKS


def _bar(plan: Plan, step: Step, x: float, width: float, widest: float) -> _Bar:
    talks = step.kind is StepKind.MOVE
    height = max(2.0, _TALK * _row_bytes(step) / widest) if talks else _COMPUTE
    label = step.name.replace("_", "-") if talks else step.name
    if _is_block(step):
        label = f"{step.name} {step.ps / 1e6:.0f} us"
    places = " to ".join(dict.fromkeys(layout_words(plan.mesh, at) for at in (step.layout, step.leaves)))
    title = f"{step.name} of {fields_words(step.reads, step.encoded)}: {places}, {step.rows} rows, "
    title += f"{step.ps / 1e6:.1f} us ({step.source.label})"
    if talks:
        title += f", {_row_bytes(step):.0f} bytes per row"
    fits = max(_LABEL_MIN, 6.4 * len(label)) <= width and height > 12
    colour = _BLOCK_COLOUR if _is_block(step) else _COLOURS.get(step.price_class, _OTHER)
    return _Bar(
        x=round(x, 2),
        y=round(_COMPUTE + 3 if talks else 1, 2),
        width=round(max(width - 0.6, 0.4), 2),
        height=round(height, 2),
        colour=colour,
        label=label if fits else "",
        label_y=round(_COMPUTE + 15 if talks else _COMPUTE / 2 + 5, 2),
        title=title,
    )


def _row_bytes(step: Step) -> float:
    """Bytes of one row of what a step carries."""
    return step.nbytes / step.rows if step.rows else 0.0
