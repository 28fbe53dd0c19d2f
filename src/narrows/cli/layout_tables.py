"""Prints the results of `narrows bench layout` as tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from narrows.bench.grid import WITHIN, Cell, Grid, PlanTimes

__all__ = ["ms", "percent", "print_grid", "sources_words"]


def print_grid(grid: Grid, out: Console) -> None:
    """Print a table per cell, with times by plan; then a row per cell, and a summary of all cells."""
    for cell in grid.cells:
        out.print(_cell_table(cell))
    out.print(_choices(grid))
    found = grid.summary
    worst = f" ({found.worst_step})" if found.worst_regret > 0 else ""
    out.print(
        f"auto is the best, or within {WITHIN:.0%} of it, in {found.right} of {found.cells} cells "
        f"({found.share_right:.0%}), beyond it with 90 % confidence in {found.surely_wrong}",
        markup=False,
    )
    out.print(f"regret: worst {percent(found.worst_regret)}{worst}, mean {percent(found.mean_regret)}", markup=False)
    out.print(
        f"mean error of a plan's price: {percent(found.mean_error)} of the whole step, "
        f"{percent(found.mean_execution_error)} of its execution",
        markup=False,
    )


def _cell_table(cell: Cell) -> Table:
    """One column per plan: measured milliseconds, and predicted ones in brackets."""
    table = Table(title=cell.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms: measured (predicted)", no_wrap=True)
    for one in cell.plans:
        table.add_column(one.name, justify="right")
    totals = [{str(name): seconds for name, seconds in one.plan.totals().items()} for one in cell.plans]
    for name in totals[0]:
        measured = [one.classes.get(name, 0.0) for one in cell.plans]
        if any(measured):
            pairs = zip(measured, totals, strict=True)
            table.add_row(f"  {name}", *(_pair(seconds, total[name]) for seconds, total in pairs))
    table.add_row("execution of the plan", *(ms(one.execution) for one in cell.plans))
    table.add_row("outside the plan", *(ms(one.outside) for one in cell.plans))
    table.add_row("whole step", *(_pair(one.seconds, one.plan.seconds) for one in cell.plans), style="bold")
    table.add_row("price less measured", *(f"{one.error:+.1%}" for one in cell.plans))
    table.add_row("auto over it", *(f"{cell.chosen_over(one).median:.3f}" for one in cell.plans))
    table.add_row("rounds", *(str(len(one.step_s)) for one in cell.plans))
    table.add_row("prices", *(sources_words(one) for one in cell.plans))
    return table


def _choices(grid: Grid) -> Table:
    """One row per cell: the choice of auto, the fastest plan, and the regret."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for name in ("measured ms", "priced", "error", "regret", "90 % between"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("auto is", "best measured", "named by price (regret)"):
        table.add_column(name)
    for cell in grid.cells:
        low, high = cell.regret_between
        table.add_row(
            cell.title,
            ms(cell.chosen.seconds),
            ms(cell.chosen.plan.seconds),
            f"{cell.chosen.error:+.0%}",
            percent(cell.regret),
            f"{100 * low:.1f} to {100 * high:.1f}" if cell.best is not cell.chosen else "",
            _others(cell.chosen),
            "auto" if cell.best is cell.chosen else _others(cell.best),
            f"{cell.named_pick} ({percent(cell.named_regret)})",
            style="" if cell.is_right else "red",
        )
    return table


def _others(one: PlanTimes) -> str:
    """The named layouts that have this plan."""
    return " = ".join(name for name in one.layouts if name != "auto") or "its own way"


def sources_words(one: PlanTimes) -> str:
    """The sources of the price, by their share of its seconds."""
    shares = {label: share for label, share in one.sources.items() if share >= 0.005}
    return ", ".join(label if share > 0.995 else f"{label} {share:.0%}" for label, share in shares.items())


def _pair(measured: float, predicted: float) -> str:
    return f"{ms(measured)} ({ms(predicted)})"


def ms(seconds: float) -> str:
    """Milliseconds with three digits.

    >>> ms(1.2345), ms(0.012345), ms(0.00001234)
    ('1234', '12.3', '0.0123')
    """
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """
    >>> percent(0.0123), percent(0.5)
    ('1.2 %', '50.0 %')
    """
    return f"{100 * share:.1f} %"
