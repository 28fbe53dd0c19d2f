"""Prints a plan report as tables of at most 120 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from narrows.arch.stages import PriceClass
from narrows.arch.weight_sharding import WeightSharding, sharding_words
from narrows.cli.console import console
from narrows.cost.bands import SHARE
from narrows.layout import Algorithm, MoveKind
from narrows.plan.plan import Op, OpKind, Plan, Segment
from narrows.plan.report.crossovers import RowRange
from narrows.plan.report.explain import compare, fields_words, layout_words, segment_difference
from narrows.plan.report.flips import LARGEST_FACTOR, Flip
from narrows.plan.report.plan_report import Entry, PlanReport

__all__ = ["print_report"]

_WIDTH = 120
_MOST_FLIPS = 4
_LEGEND = "prices: m measured, i interpolated, s scaled from another device, size or shape, r roofline"


def print_report(report: PlanReport) -> None:
    """Print the whole report on standard output."""
    page = _Page(console())
    if report.warning:
        page.put(Text(f"WARNING: {report.warning}", "bold"))
    _print_header(page, report)
    page.put(_totals(report))
    _print_plan(page, report.auto.plan)
    page.bullets("Why auto (rows are those of the rank that has most)", report.why)
    page.bullets("How sure that is", _sure(report))
    page.title("Cheapest of the named layouts, by rows of the step")
    page.put(_ranges(report.best_named))
    page.title("What auto does in most layers, by rows of the step")
    page.put(_ranges(report.best_auto))
    page.bullets("Memory per rank", _memory(report))
    page.bullets("Layouts that do not apply", [f"{name}: {reason}" for name, reason in report.inapplicable.items()])
    page.bullets("Notes", report.notes)


class _Page:
    """A console that prints nothing wider than a page, and cuts nothing off."""

    def __init__(self, on: Console) -> None:
        self.on, self.width = on, min(on.width, _WIDTH)

    def put(self, what: RenderableType) -> None:
        self.on.print(what, width=self.width)

    def title(self, title: str) -> None:
        self.put("")
        self.put(Text(title, "bold"))

    def bullets(self, title: str, lines: Sequence[str]) -> None:
        if not lines:
            return
        self.title(title)
        grid = Table.grid(padding=(0, 1))
        for line in lines:
            grid.add_row("-", Text(line))
        self.put(grid)


def _print_header(page: _Page, report: PlanReport) -> None:
    deployment, shape = report.deployment, report.shape
    mesh, published, topology = deployment.mesh, WeightSharding(), deployment.topology
    groups = f" ({' + '.join(str(n) for n in shape.group_rows)})" if mesh.num_groups > 1 else ""
    launch = (
        "" if deployment.device.shared_memory else ", in a CUDA graph" if deployment.graph else ", launched eagerly"
    )
    where = "" if topology.is_one_node else f", {topology.num_nodes} nodes of {topology.ranks_per_node}"
    devices = f"{mesh.size} x {deployment.device.title}{where}"
    page.put(Text(f"{deployment.config.name} on {mesh}: {devices}, {deployment.dtype}", "bold"))
    page.put(
        f"one {shape.phase} step of {shape.rows.total} rows{groups}, context {shape.context}, "
        f"logits of {shape.logits.total}{launch}"
    )
    words = sharding_words(deployment.config, published)
    if report.auto.sharding == published:
        page.put(f"weight sharding: {words}")
    else:
        chosen = sharding_words(deployment.config, report.auto.sharding)
        page.put(f"weight sharding of auto, chosen for this one step: {chosen}")
        page.put(f"weight sharding of the named layouts, as published: {words}")
    if deployment.encode_rows != "none":
        page.put(f"rows before gathers: {_encoded(report)}")
    page.put(_LEGEND)
    if report.evidence:
        page.put(report.evidence)
    page.put("")


def _encoded(report: PlanReport) -> str:
    """The requested encoding, and in how many of its gathers auto uses it."""
    gathers = [op for _, op in report.auto.plan.ops() if op.move and op.move.kind is MoveKind.ALL_GATHER]
    encoded = sum(bool(op.encoded) for op in gathers)
    return f"{report.deployment.encode_rows}; auto encodes rows in {encoded} of its {len(gathers)} gathers"


def _totals(report: PlanReport) -> Table:
    entries = report.entries if report.auto in report.entries else (*report.entries, report.auto)
    totals = compare([entry.plan for entry in entries])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("ms per step")
    for name in totals.names:
        table.add_column(name, justify="right")
    for price_class, seconds in totals.seconds.items():
        if any(seconds):
            table.add_row(str(price_class), *(f"{1e3 * s:.2f}" for s in seconds))
        between = [entry.plan.internode_seconds for entry in entries]
        if price_class is PriceClass.COMMUNICATION and any(between):
            table.add_row("  of it between nodes", *(f"{1e3 * s:.2f}" for s in between))
    table.add_row("total", *(f"{1e3 * s:.2f}" for s in totals.totals), style="bold")
    table.add_row("against the best", *(f"x {ratio:.3f}" for ratio in totals.ratios))
    if not all(entry.memory.fits for entry in entries):
        table.add_row("memory", *("fits" if entry.memory.fits else "does not fit" for entry in entries))
    return table


# -- the plan, op by op ------------------------------------------------------------------------------------------------


def _print_plan(page: _Page, plan: Plan) -> None:
    """Print each kind of layer once, as most of its layers run it, and a line per layer that differs."""
    page.title(f"The plan {plan.layout_name}, op by op ({plan.num_ops} ops in all)")
    segments = _gathered(plan.segments)
    usual: dict[str, Segment] = {}
    for segment in segments:
        if segment.name not in usual or segment.times > usual[segment.name].times:
            usual[segment.name] = segment
    table = _op_table(header=True)
    for segment in segments:
        if segment is usual[segment.name]:
            page.put(table)
            page.put(Text(_segment_title(segment), "bold"))
            table = _op_table(header=False)
            for op in segment.ops:
                table.add_row(*_op(plan, op, segment.times))
            page.put(table)
            table = _op_table(header=False)
        else:
            changes = segment_difference(plan, usual[segment.name], segment)
            like = f"{_segment_name(segment)}: as the other {segment.name} layers, but {changes}"
            page.put(Padding(Text(like), (0, 0, 0, 2)))


def _gathered(segments: Sequence[Segment]) -> list[Segment]:
    """Segments with the same ops joined at the first of them; kinds of layers may alternate."""
    gathered: list[Segment] = []
    for segment in segments:
        same = next((i for i, one in enumerate(gathered) if (one.name, one.ops) == (segment.name, segment.ops)), None)
        if same is None:
            gathered.append(segment)
        else:
            gathered[same] = replace(gathered[same], layers=gathered[same].layers + segment.layers)
    return gathered


def _segment_name(segment: Segment) -> str:
    if not segment.layers:
        return f"{segment.name} the layers"
    runs: list[tuple[int, int]] = []
    for layer in segment.layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = runs[-1][0], layer
        else:
            runs.append((layer, layer))
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{segment.name} layer{'s' if len(segment.layers) > 1 else ''} {words}"


def _segment_title(segment: Segment) -> str:
    each = sum(op.ps for op in segment.ops) / 1e9
    times = f"{segment.times} x " if segment.times > 1 else ""
    return f"{_segment_name(segment)}: {times}{each:.2f} ms"


def _op_table(*, header: bool) -> Table:
    """Fixed widths, so that the tables of all segments line up."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header)
    for title, width in (("op", 25), ("before", 14), ("fields", 17), ("layout", 18)):
        table.add_column(title, min_width=width)
    for title, width in (("rows", 6), ("MB", 7), ("us", 8), ("ms, all", 7)):
        table.add_column(title, min_width=width, justify="right")
    table.add_column("", min_width=1)
    return table


def _op(plan: Plan, op: Op, times: int) -> tuple[str, ...]:
    reads, leaves = layout_words(plan.mesh, op.layout), layout_words(plan.mesh, op.leaves)
    name, before = op.name, "" if op.kind is OpKind.STAGE else op.boundary
    if op.move is not None:
        name = f"{name.replace('_', '-')} {op.move.axes}{_across(plan, op)}"
    return (
        f"> {name}" if before else name,
        before,
        fields_words(plan.roles.bundle_of, op.reads, op.encoded),
        reads if reads == leaves else f"{reads} -> {leaves}",
        str(op.rows),
        _amount(op.nbytes / 1e6),
        f"{op.ps / 1e6:.1f}",
        f"{op.ps * times / 1e9:.2f}",
        op.source.label[0],
    )


def _across(plan: Plan, op: Op) -> str:
    """That a group lies on several nodes, and what it does about it."""
    assert op.move is not None
    if op.move.algorithm is not Algorithm.FLAT:
        return f", {op.move.algorithm}"
    nodes = plan.num_nodes(op)
    return f", {nodes} nodes" if nodes > 1 else ""


def _amount(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _sure(report: PlanReport) -> list[str]:
    """The band of auto's total, and the errors of prices that would change the choice."""
    plan = report.auto.plan
    lines = [
        f"auto takes {1e3 * plan.seconds:.2f} ms, give or take {plan.band:.0%} (docs/published.md): {SHARE:.0%} of the "
        "prices that could be compared with a measurement lie within their bands"
    ]
    shown = report.flips[:_MOST_FLIPS]
    lines += [f"another plan is best if {flip} ({100 * flip.cost:.1f} % at x {_far(flip):g})" for flip in shown]
    rest = "no other error" if shown else "no error"
    lines.append(
        f"{rest} of one kind of price up to a factor of {LARGEST_FACTOR:g} changes how rows travel in most layers"
        if len(report.flips) <= _MOST_FLIPS
        else f"{len(report.flips) - _MOST_FLIPS} larger errors would too (--json)"
    )
    return lines


def _far(flip: Flip) -> float:
    return LARGEST_FACTOR if flip.factor > 1 else 1 / LARGEST_FACTOR


# -- crossovers and memory ---------------------------------------------------------------------------------------------


def _ranges(ranges: Sequence[RowRange]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column()
    grid.add_column(justify="right")
    for found in ranges:
        grid.add_row(f"  {found.first}", "to", str(found.last), Text(f" {found.best}"))
    return grid


def _memory(report: PlanReport) -> list[str]:
    """One line per weight sharding that the plans of the report have."""
    lines: dict[str, str] = {}
    auto, published = report.auto, WeightSharding()
    for entry in (*report.entries, auto):
        whose = "sharding of auto" if entry.sharding == auto.sharding else f"sharding of {entry.plan.layout_name}"
        whose = "published sharding" if entry.sharding == published else whose
        lines[whose] = f"{whose}: {_fit(entry, report.shape.kv_tokens)}"
    return list(lines.values())


def _fit(entry: Entry, step_tokens: int) -> str:
    """Of the layout among those of this sharding that comes last; `auto` if it is one."""
    memory, step = entry.memory, entry.workspace
    parts = (
        ("activations", step.activations),
        ("kept by kernels", step.kept),
        ("collectives", step.collectives),
        ("logits", step.logits),
    )
    words = ", ".join(f"{name} {nbytes / 1e9:.2f}" for name, nbytes in parts if nbytes)
    has = (
        f"the device has {memory.device / 1e9:.1f} GB, {memory.usable / 1e9:.1f} GB usable: less "
        f"{memory.process / 1e9:.2f} GB for the process and {memory.workspace / 1e9:.2f} GB for such a step"
        f"{f' ({words})' if words else ''}"
    )
    if not memory.fits:
        return f"does not fit: needs {memory.weights / 1e9:.1f} GB for weights, {has}"
    line = (
        f"weights {memory.weights / 1e9:.1f} GB, KV cache {memory.kv_per_token} bytes per token; {has}, so "
        f"{memory.context_tokens} tokens of context fit per attention group"
    )
    if not memory.holds(step_tokens):
        line += f", not the {step_tokens} of this step"
    return line
