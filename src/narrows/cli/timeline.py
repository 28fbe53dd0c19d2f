"""Draws the steps of a layer as bars on a time axis.

Bars above the axis are computation, bars below it communication. The height of a communication bar is the number of
bytes per row that cross ranks, so that a narrow gather looks narrow. Attention, MLP and experts differ little between
layouts, and may be drawn as blocks of one width, not to scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, FunctionLoader

from narrows.arch.stages import PriceClass
from narrows.plan.explain import fields_words, layout_words
from narrows.plan.plan import Plan, Step, StepKind

__all__ = ["BLOCK_WIDTH", "COLOURS", "Band", "Bar", "draw", "is_block", "render", "row_bytes", "step_title"]

COLOURS: Mapping[PriceClass, str] = {
    PriceClass.QKV_A_PROJ: "#4e79a7",
    PriceClass.NORM: "#59a14f",
    PriceClass.ADD: "#8cd17d",
    PriceClass.ROUTER: "#b6992d",
    PriceClass.COMMUNICATION: "#e15759",
}
BLOCK_WIDTH = 120.0
_BLOCKS = (PriceClass.ATTENTION, PriceClass.MLP, PriceClass.EXPERTS)
_BLOCK_COLOUR = "#b5b1ad"
_OTHER = "#86bcb6"
_LABEL_MIN = 46.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One step. ``label`` is empty where it has no room; ``title`` has all details."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str
    label_y: float
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where a timeline lies: its left end, its top, and the space above the axis (``compute``) and below it (``talk``).

    ``scale``: pixels per microsecond; ``widest``: bytes per row of the highest communication bar; ``blocks``: whether
    attention, MLP and experts are blocks of one width.
    """

    left: float = 0.0
    top: float = 0.0
    compute: float = 34.0
    talk: float = 62.0
    scale: float
    widest: float
    blocks: bool = True

    @property
    def middle(self) -> float:
        """The axis, between computation and communication."""
        return self.top + self.compute + 2

    @property
    def height(self) -> float:
        return self.compute + self.talk + 6


def draw(
    steps: Sequence[Step], times_us: Sequence[float], band: Band, title: Callable[[Step], str]
) -> tuple[tuple[Bar, ...], float]:
    """The bars of ``steps``, each as long as its time, and where the last one ends."""
    bars: list[Bar] = []
    x = band.left
    for step, us in zip(steps, times_us, strict=True):
        width = BLOCK_WIDTH if band.blocks and is_block(step) else us * band.scale
        if us:
            bars.append(_bar(step, us, x, width, band, title(step)))
        x += width
    return tuple(bars), x


def _bar(step: Step, us: float, x: float, width: float, band: Band, title: str) -> Bar:
    talks = step.kind is StepKind.MOVE
    height = max(2.0, band.talk * row_bytes(step) / band.widest) if talks else band.compute
    label = step.name.replace("_", "-") if talks else step.name
    if is_block(step):
        label = f"{step.name} {us:.0f} us"
    fits = max(_LABEL_MIN, 6.4 * len(label)) <= width and height > 12
    return Bar(
        x=round(x, 2),
        y=round(band.middle + 1 if talks else band.top + 1, 2),
        width=round(max(width - 0.6, 0.4), 2),
        height=round(height, 2),
        colour=_BLOCK_COLOUR if is_block(step) else COLOURS.get(step.price_class, _OTHER),
        label=label if fits else "",
        label_y=round(band.top + (band.compute + 15 if talks else band.compute / 2 + 5), 2),
        title=title,
    )


def is_block(step: Step) -> bool:
    """Whether the step is attention, the MLP or the experts."""
    return step.kind is StepKind.STAGE and step.price_class in _BLOCKS


def row_bytes(step: Step) -> float:
    """Bytes per row that a step moves."""
    return step.nbytes / step.rows if step.rows else 0.0


def step_title(plan: Plan, step: Step, times: str) -> str:
    """A step in words: its name, its rows, its time (``times``), and what it moves."""
    places = " to ".join(dict.fromkeys(layout_words(plan.mesh, at) for at in (step.layout, step.leaves)))
    fields = fields_words(plan.roles.bundle_of, step.reads, step.encoded)
    title = f"{step.name} of {fields}: {places}, {step.rows} rows, {times}"
    return f"{title}, {row_bytes(step):.0f} bytes per row" if step.kind is StepKind.MOVE else title


def render(template: str, **values: object) -> str:
    """Render a template of this folder; the page refers to nothing outside it."""
    loader = FunctionLoader(lambda name: files("narrows.cli").joinpath(name).read_text(encoding="utf-8"))
    return Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(template).render(**values)
