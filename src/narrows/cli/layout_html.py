"""Draws the results of `narrows bench layout` as one self-contained page.

Each plan has two timelines of its usual layer, on one scale per step: the predicted one and the measured one. The page
has no script: form controls choose the step that is shown, and the style sheet reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrows.arch.stages import PriceClass
from narrows.bench.grid import WITHIN, Cell, Grid, PlanTimes
from narrows.calibrate.statistics import ratios
from narrows.cli.layout_tables import ms, percent, sources_words
from narrows.cli.timeline import BLOCK_WIDTH, COLOURS, Band, Bar, draw, is_block, op_title, render, row_bytes
from narrows.plan.plan import Op
from narrows.plan.report.explain import main_segment

__all__ = ["grid_page"]

_WIDTH, _LEFT, _RIGHT = 1060.0, 64.0, 66.0
_COMPUTE, _TALK = 26.0, 40.0
_LAYOUTS = {
    "all-reduce": "#4e79a7",
    "attn-tp-input-scattered": "#e15759",
    "norm-before-gather": "#f28e2b",
    "sequence-parallel": "#59a14f",
    "auto": "#777",
}
_MOST = 2.0
"""A plan that takes more than this many times auto's time is drawn at the edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One timeline: predicted or measured."""

    name: str
    y: float
    middle: float
    bars: tuple[Bar, ...]
    end: float
    total: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """The layer of one plan twice: to scale, and with blocks of one width."""

    kind: str
    lines: tuple[_Line, ...]
    joints: tuple[str, ...]
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanView:
    name: str
    is_auto: bool
    is_best: bool
    words: str
    drawings: tuple[_Drawing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """A plan in the figure of choices: its measured time with its spread, and its price, relative to auto's."""

    x: float
    low: float
    high: float
    priced: float
    colour: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _CellView:
    title: str
    words: str
    is_right: bool
    marks: tuple[_Mark, ...]
    plans: tuple[_PlanView, ...]
    names: tuple[str, ...]
    table: tuple[tuple[str, tuple[str, ...]], ...]


def grid_page(grid: Grid, title: str, subtitle: str) -> str:
    """The page, as HTML text without references to anything outside it."""
    axis = _Axis.of(grid.cells)
    found = grid.summary
    shown = {op.price_class for cell in grid.cells for one in cell.plans for _, op in one.plan.ops()}
    names = dict.fromkeys(name for cell in grid.cells for one in cell.plans for name in one.layouts if name != "auto")
    return render(
        "layout_page.html.jinja",
        title=title,
        subtitle=subtitle,
        key=[(c.value, COLOURS[c]) for c in PriceClass if c in shown and c in COLOURS],
        layouts=[(name, _LAYOUTS[name]) for name in (*names, "auto")],
        verdict=f"auto is the best, or within {WITHIN:.0%} of it, in {found.right} of {found.cells} steps. Worst "
        f"regret: {percent(found.worst_regret)}; mean error of prices: {percent(found.mean_error)} of a step.",
        axis=axis,
        cells=[_cell(cell, axis) for cell in grid.cells],
        notes=grid.notes,
        width=_WIDTH,
        left=_LEFT,
    )


# -- the figure of choices ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Multiples of auto's time, from left to right."""

    low: float
    high: float
    left: float = 190.0
    right: float = _WIDTH - 20

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> _Axis:
        held = [over for cell in cells for one in cell.plans for over in _over_auto(cell, one)]
        return cls(low=min(0.95, *held) - 0.02, high=min(_MOST, max(1.1, *held)) + 0.02)

    def at(self, ratio: float) -> float:
        share = (min(max(ratio, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.left + share * (self.right - self.left), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if (self.high - self.low) / step <= 12)
        first, last = int(self.low / step) + 1, int(self.high / step)
        return [(self.at(i * step), f"{i * step:.2f}") for i in range(first, last + 1)]

    @property
    def one(self) -> float:
        return self.at(1.0)

    @property
    def wrong(self) -> float:
        """Left of this a plan is so much faster than auto that the choice was wrong."""
        return self.at(1 / (1 + WITHIN))


def _over_auto(cell: Cell, one: PlanTimes) -> tuple[float, float, float, float]:
    """Measured time over auto's: median, p10 and p90; price over auto's price."""
    found = ratios(one.step_s, cell.chosen.step_s)
    return found.median, found.p10, found.p90, one.plan.ps / cell.chosen.plan.ps


def _mark(cell: Cell, one: PlanTimes, axis: _Axis) -> _Mark:
    measured, low, high, priced = _over_auto(cell, one)
    return _Mark(
        x=axis.at(measured),
        low=axis.at(low),
        high=axis.at(high),
        priced=axis.at(priced),
        colour=_LAYOUTS[one.layouts[0]],
        title=f"{one.name}: measured {measured:.3f} of auto (p10 to p90 {low:.3f} to {high:.3f}), priced {priced:.3f}",
    )


# -- one step of the grid ----------------------------------------------------------------------------------------------


def _cell(cell: Cell, axis: _Axis) -> _CellView:
    plans = sorted(cell.plans, key=lambda one: one is not cell.chosen)
    best = "the fastest measured" if cell.best is cell.chosen else f"{cell.best.name} is the fastest measured"
    regret = "" if cell.best is cell.chosen else f", regret {percent(cell.regret)}"
    scale, blocks = _scales(plans)
    widest = max((row_bytes(op) for one in plans for op in _ops(one) if op.move is not None), default=1.0)
    names = dict.fromkeys(name for one in plans for name in one.classes)
    table = [
        (str(c), tuple(f"{ms(one.classes.get(c, 0.0))} ({ms(one.plan.totals()[c])})" for one in plans))
        for c in PriceClass
        if c in names
    ]
    table.append(("outside the plan", tuple(ms(one.outside) for one in plans)))
    table.append(("whole step", tuple(f"{ms(one.seconds)} ({ms(one.plan.seconds)})" for one in plans)))
    return _CellView(
        title=cell.title,
        words=f"auto is {best}{regret}" if cell.best is cell.chosen else f"{best}{regret}",
        is_right=cell.is_right,
        marks=tuple(_mark(cell, one, axis) for one in plans if one is not cell.chosen),
        plans=tuple(
            _PlanView(
                name=one.name,
                is_auto=one is cell.chosen,
                is_best=one is cell.best,
                words=f"whole step {ms(one.seconds)} ms measured, {ms(one.plan.seconds)} ms priced "
                f"({one.error:+.0%}; {sources_words(one)})",
                drawings=(_drawing(one, "scaled", scale, widest), _drawing(one, "blocks", blocks, widest)),
            )
            for one in plans
        ),
        names=tuple(one.name for one in plans),
        table=tuple(table),
    )


def _scales(plans: Sequence[PlanTimes]) -> tuple[float, float]:
    """Pixels per microsecond that let the longest layer fit: with all steps to scale, and without the blocks."""
    room = _WIDTH - _LEFT - _RIGHT
    whole, rest, blocks = 1e-9, 1e-9, 0
    for one in plans:
        ops = _ops(one)
        for times in (_priced_us(one), _measured_us(one)):
            whole = max(whole, sum(times))
            rest = max(rest, sum(us for op, us in zip(ops, times, strict=True) if not is_block(op)))
        blocks = max(blocks, sum(map(is_block, ops)))
    return room / whole, (room - blocks * BLOCK_WIDTH) / rest


def _ops(one: PlanTimes) -> tuple[Op, ...]:
    return main_segment(one.plan).ops


def _priced_us(one: PlanTimes) -> list[float]:
    return [1e6 * op.seconds for op in _ops(one)]


def _measured_us(one: PlanTimes) -> list[float]:
    at = one.plan.segments.index(main_segment(one.plan))
    return [1e6 * seconds for seconds in one.segment_s[at]]


def _drawing(one: PlanTimes, kind: str, scale: float, widest: float) -> _Drawing:
    ops, pairs = _ops(one), {}
    for op, priced, measured in zip(ops, _priced_us(one), _measured_us(one), strict=True):
        times = f"measured {measured:.1f} us, priced {priced:.1f} us ({op.source.label})"
        pairs[id(op)] = op_title(one.plan, op, times)
    lines = []
    top = 0.0
    for name, times_us in (("priced", _priced_us(one)), ("measured", _measured_us(one))):
        band = Band(
            left=_LEFT,
            top=top,
            compute=_COMPUTE,
            talk=_TALK,
            scale=scale,
            widest=widest,
            blocks=kind == "blocks",
        )
        bars, end = draw(ops, times_us, band, lambda op: pairs[id(op)])
        total = f"{sum(times_us):.0f} us"
        lines.append(_Line(name=name, y=top + 17, middle=band.middle, bars=bars, end=round(end + 6, 2), total=total))
        top += band.height
    return _Drawing(kind=kind, lines=tuple(lines), joints=_joints(lines[0], lines[1]), height=top)


def _joints(priced: _Line, measured: _Line) -> tuple[str, ...]:
    """For each communication bar, the corners of a faint band from its predicted to its measured position."""
    by_title = {bar.title: bar for bar in measured.bars}
    out = []
    for bar in priced.bars:
        other = by_title.get(bar.title)
        if other is None or bar.colour != COLOURS[PriceClass.COMMUNICATION]:
            continue
        corners = (
            (bar.x, bar.y + bar.height),
            (bar.x + bar.width, bar.y + bar.height),
            (other.x + other.width, other.y),
            (other.x, other.y),
        )
        out.append(" ".join(f"{x:.1f},{y:.1f}" for x, y in corners))
    return tuple(out)
