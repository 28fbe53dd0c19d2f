"""Draws the ops of a layer as bars on a time axis.

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
from narrows.plan.plan import Op, OpKind, Plan
from narrows.plan.report.explain import fields_words, layout_words

__all__ = ["BLOCK_WIDTH", "COLOURS", "Band", "Bar", "draw", "is_block", "op_title", "render", "row_bytes"]

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
    """One op. ``label`` is empty where it has no room; ``title`` has all details."""

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
    """The position of a timeline: left end, top, and the space above the axis (``compute``) and below it (``talk``).

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
    ops: Sequence[Op], times_us: Sequence[float], band: Band, title: Callable[[Op], str]
) -> tuple[tuple[Bar, ...], float]:
    """The bars of ``ops``, each as long as its time, and where the last one ends."""
    bars: list[Bar] = []
    x = band.left
    for op, us in zip(ops, times_us, strict=True):
        width = BLOCK_WIDTH if band.blocks and is_block(op) else us * band.scale
        if us:
            bars.append(_bar(op, us, x, width, band, title(op)))
        x += width
    return tuple(bars), x


def _bar(op: Op, us: float, x: float, width: float, band: Band, title: str) -> Bar:
    talks = op.kind is OpKind.MOVE
    height = max(2.0, band.talk * row_bytes(op) / band.widest) if talks else band.compute
    label = op.name.replace("_", "-") if talks else op.name
    if is_block(op):
        label = f"{op.name} {us:.0f} us"
    fits = max(_LABEL_MIN, 6.4 * len(label)) <= width and height > 12
    return Bar(
        x=round(x, 2),
        y=round(band.middle + 1 if talks else band.top + 1, 2),
        width=round(max(width - 0.6, 0.4), 2),
        height=round(height, 2),
        colour=_BLOCK_COLOUR if is_block(op) else COLOURS.get(op.price_class, _OTHER),
        label=label if fits else "",
        label_y=round(band.top + (band.compute + 15 if talks else band.compute / 2 + 5), 2),
        title=title,
    )


def is_block(op: Op) -> bool:
    """Whether the op is attention, the MLP or the experts."""
    return op.kind is OpKind.STAGE and op.price_class in _BLOCKS


def row_bytes(op: Op) -> float:
    """Bytes per row that an op moves."""
    return op.nbytes / op.rows if op.rows else 0.0


def op_title(plan: Plan, op: Op, times: str) -> str:
    """An op in words: its name, its rows, its time (``times``), and its fields."""
    layouts = " to ".join(dict.fromkeys(layout_words(plan.mesh, at) for at in (op.layout, op.leaves)))
    fields = fields_words(plan.roles.bundle_of, op.reads, op.encoded)
    title = f"{op.name} of {fields}: {layouts}, {op.rows} rows, {times}"
    return f"{title}, {row_bytes(op):.0f} bytes per row" if op.kind is OpKind.MOVE else title


def render(template: str, **values: object) -> str:
    """Render a template of this folder; the page refers to nothing outside it."""
    loader = FunctionLoader(lambda name: files("narrows.cli").joinpath(name).read_text(encoding="utf-8"))
    return Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(template).render(**values)
