"""Draws a plan report as one self-contained page: each layout's usual layer as a timeline.

All layouts are on one scale of time (`timeline.py`). Attention and experts take much more time than the rest and move
little between layouts: they are blocks, not to scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from narrows.arch.stages import PriceClass
from narrows.cli.timeline import BLOCK_WIDTH, COLOURS, Band, Bar, draw, is_block, op_title, render, row_bytes
from narrows.plan.plan import Op, Plan
from narrows.plan.report.explain import main_segment
from narrows.plan.report.plan_report import PlanReport

__all__ = ["report_page"]

_WIDTH = 1060.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    total: str
    ratio: str
    layer_us: str
    end: float
    bars: tuple[Bar, ...]


def report_page(report: PlanReport) -> str:
    """The page, as HTML text without references to anything outside it."""
    plans = [entry.plan for entry in report.entries]
    best = min(plan.ps for plan in plans)
    scaled = [[_us(op) for op in main_segment(plan).ops if not is_block(op)] for plan in plans]
    blocks = max(sum(is_block(op) for op in main_segment(plan).ops) for plan in plans)
    widest = max((row_bytes(op) for plan in plans for op in main_segment(plan).ops if op.move is not None), default=1.0)
    longest = max(map(sum, scaled)) or 1.0
    band = Band(scale=(_WIDTH - 80 - blocks * BLOCK_WIDTH) / longest, widest=widest)
    rows = tuple(_row(plan, best, band) for plan in plans)
    classes = [c for c in PriceClass if any(plan.totals()[c] for plan in plans)]
    totals = [(c.value, [f"{plan.totals()[c] * 1e3:.2f}" for plan in plans]) for c in classes]
    totals.append(("total", [f"{plan.seconds * 1e3:.2f}" for plan in plans]))
    deployment, shape = report.deployment, report.shape
    return render(
        "plan_page.html.jinja",
        title=f"{deployment.config.name} on {deployment.mesh} of {deployment.device.title}",
        subtitle=f"{deployment.dtype}, one {shape.phase} step of {shape.rows.total} rows, context {shape.context}; "
        "predicted by narrows plan",
        key=[(c.value, COLOURS[c]) for c in classes if c in COLOURS],
        layer_name=main_segment(plans[0]).name,
        rows=rows,
        totals=totals,
        why=report.why,
        notes=(*filter(None, [report.evidence]), *report.notes),
        width=_WIDTH,
        height=band.height,
        middle=band.middle,
    )


def _row(plan: Plan, best: int, band: Band) -> _Row:
    ops = main_segment(plan).ops

    def title(op: Op) -> str:
        return op_title(plan, op, f"{_us(op):.1f} us ({op.source.label})")

    bars, end = draw(ops, [_us(op) for op in ops], band, title)
    return _Row(
        name=plan.layout_name,
        total=f"{plan.seconds * 1e3:.1f}",
        ratio="" if plan.ps == best else f"{plan.ps / best:.3f} times",
        layer_us=f"{sum(map(_us, ops)):.0f}",
        end=round(end + 6, 2),
        bars=bars,
    )


def _us(op: Op) -> float:
    return op.ps / 1e6
