"""Prints the outcome of a benchmark as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from narrows.bench.grid import Grid
from narrows.bench.results import Outcome, Series
from narrows.cli.layout_tables import print_grid

__all__ = ["print_outcome"]

_FACTS = {
    "tok_per_s": ("tok/s", 1.0, "{:.1f}"),
    "gflop": ("GFLOP", 1.0, "{:.1f}"),
    "experts_hit": ("experts hit", 1.0, "{:.1f}"),
    "weights_mb": ("weights MB", 1.0, "{:.0f}"),
    "kv_mb": ("KV MB", 1.0, "{:.1f}"),
    "share_of_roofline": ("% of roofline", 100.0, "{:.0f}"),
    "share_of_bound": ("% of bound", 100.0, "{:.0f}"),
    "memory_mb": ("memory MB", 1.0, "{:.0f}"),
    "memcpy_us": ("memcpy us", 1.0, "{:.1f}"),
    "times_memcpy": ("x memcpy", 1.0, "{:.2f}"),
}
"""Title, factor and format of the further facts that a result may have."""


def print_outcome(bench: str, title: str, where: Mapping[str, Any], outcome: Outcome, out: Console) -> None:
    """Print the machine, the table, the machine's rates beside it, and the notes."""
    features = f" ({', '.join(where['features'])})" if where["features"] else ""
    out.print(title, style="bold", markup=False)
    out.print(
        f"{where['cpu']}{features}, {where['cores']} cores, {where['memory_gib']} GiB, {where['date']}; "
        f"load before: {where['load_average_before']:.1f}",
        markup=False,
    )
    if isinstance(outcome, Grid):
        print_grid(outcome, out)
    else:
        out.print(_layer_table(outcome) if bench == "layer" else _table(outcome))
    for name, found in outcome.calibration.items():
        what, unit = name.partition("_")[0], name.partition("_")[2].replace("_per_s", "/s")
        out.print(
            f"{what}: {found.median / 1e9:.1f} G{unit} (p10-p90 {found.p10 / 1e9:.1f}-{found.p90 / 1e9:.1f}), "
            "all ranks together",
            markup=False,
        )
    for note in outcome.notes:
        out.print(f"note: {note}", markup=False)


def _table(outcome: Outcome) -> Table:
    """One row per work and variant."""
    known = [name for name in _FACTS if any(name in f for series in outcome.series for f in series.facts.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", no_wrap=True)
    table.add_column("variant", overflow="fold")
    for name in ("median", "p10-p90", "", "runs", "x first", *(_FACTS[name][0] for name in known)):
        table.add_column(name, justify="right", no_wrap=True)
    for series in outcome.series:
        for at, name in enumerate(series.values):
            found, facts = series.spread(name), series.facts.get(name, {})
            table.add_row(
                "" if at else series.work,
                name,
                _number(found.median),
                f"{_number(found.p10)}-{_number(found.p90)}",
                series.unit,
                str(found.count),
                _ratio(series, name),
                *(_fact(fact, facts) for fact in known),
            )
    return table


def _fact(name: str, facts: Mapping[str, float]) -> str:
    _, factor, form = _FACTS[name]
    return form.format(factor * facts[name]) if name in facts else ""


def _layer_table(outcome: Outcome) -> Table:
    """One row per part of the step, one column per variant: measured, and predicted in brackets."""
    variants = list(outcome.series[0].values)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms per step: measured (predicted)", no_wrap=True)
    for name in variants:
        table.add_column(name, justify="right")
    for series in outcome.series:
        if any(any(values) for values in series.values.values()):
            table.add_row(series.work, *(_cell(series, name) for name in variants))
    total = outcome.series[-1]
    table.add_row("  p10-p90", *(f"{_number(total.spread(n).p10)}-{_number(total.spread(n).p90)}" for n in variants))
    table.add_row("  x first", *(_ratio(total, name) for name in variants))
    return table


def _ratio(series: Series, name: str) -> str:
    ratio = series.ratio(name)
    return "" if ratio is None else f"{ratio.median:.3f}"


def _cell(series: Series, name: str) -> str:
    predicted = series.facts.get(name, {}).get("predicted_ms")
    return _number(series.spread(name).median) + ("" if predicted is None else f" ({_number(predicted)})")


def _number(value: float) -> str:
    """
    >>> _number(1234.5), _number(12.345), _number(0.01234)
    ('1234', '12.3', '0.0123')
    """
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
