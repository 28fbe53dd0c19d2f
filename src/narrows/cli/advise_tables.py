"""Prints advice: what to run, what it is predicted to do, what it costs against narrows' own best, and all ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrows.advise.flags import flag_list
from narrows.advise.measured import Comparison
from narrows.advise.missing import StepCosting
from narrows.advise.search import Advice, Setting, Trial
from narrows.advise.served import price_band, served_bands
from narrows.cli.simulate_tables import print_ranking, print_unfit
from narrows.cost.bands import SHARE
from narrows.plan.report.evidence import nodes_line

__all__ = ["print_advice", "print_comparison"]


def print_advice(
    engine: str,
    title: str,
    lines: Sequence[str],
    advice: Advice,
    costing: Sequence[StepCosting],
    setting: Setting,
    out: Console,
) -> None:
    """Print all of it, the command line first."""
    known, best = flag_list(engine), advice.best
    assert best is not None and best.candidate.outcome is not None
    outcome, memory = best.candidate.outcome, best.candidate.memory
    print_unfit([trial.candidate for trial in advice.trials], out)
    out.print(Text(f"{known.title} {known.version}, {title}", "bold"))
    if setting.target.is_set and (misses := setting.target.misses(outcome)):
        line = f"nothing that {known.title} can do here meets the target; the nearest {' and '.join(misses)}"
        out.print(Text(line, "bold"))
    out.print(Text(f"{best.candidate.mesh}: {best.candidate.layout}"))
    for host, line in enumerate(lines):
        out.print(Text(f"\nrun{f' on host {host}' if len(lines) > 1 else ''}:\n"))
        out.print(Text(f"    {line}"), soft_wrap=True)
    out.print("")
    out.print(_figures(engine, best, setting))
    if memory is not None:
        out.print(
            f"memory per rank: weights {memory.weights / 1e9:.1f} GB, KV cache "
            f"{best.candidate.kv_tokens * memory.kv_per_token / 1e9:.1f} GB ({best.candidate.kv_tokens} tokens per "
            f"attention group), of {memory.usable / 1e9:.1f} GB usable",
            markup=False,
        )
    out.print(f"prices rest on (of the time): {_shares(outcome.sources)}", markup=False)
    out.print(
        f"bands hold {SHARE:.0%}: of published runs of {known.title}, or of prices (here within "
        f"{price_band(best):.0%}) where those are less certain",
        markup=False,
    )
    for note in filter(None, (setting.engine.note, nodes_line(setting.deployment(best.candidate.mesh, best.experts)))):
        out.print(f"note: {note}", markup=False)
    _print_own(known.title, advice, costing, out)
    out.print(Text(f"\nAll ways of {known.title} that are known here", "bold"))
    print_ranking([trial.candidate for trial in advice.trials], setting.target, out)


def _figures(engine: str, best: Trial, setting: Setting) -> Table:
    outcome = best.candidate.outcome
    assert outcome is not None
    found, bands = outcome.figures, served_bands(engine, best)
    table = Table(title="predicted", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "mean", "band of the mean", "median", "p99"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, which, latency in (("TTFT, ms", "ttft", found.ttft_ms), ("TPOT, ms", "tpot", found.tpot_ms)):
        low, high = bands[which]
        table.add_row(
            name,
            f"{latency.mean:.1f}",
            f"{low * latency.mean:.1f} to {high * latency.mean:.1f}",
            f"{latency.median:.1f}",
            f"{latency.p99:.1f}",
        )
    for name, value in (
        ("output tokens per second", f"{found.output_throughput:.1f}"),
        ("requests per second", f"{found.request_throughput:.2f}"),
    ):
        table.add_row(name, value)
    if setting.target.is_set:
        table.add_row("goodput", f"{setting.target.goodput(outcome):.2f}")
    return table


def _print_own(title: str, advice: Advice, costing: Sequence[StepCosting], out: Console) -> None:
    """What narrows' own plans would give under the same host, and what the engine lacks for it."""
    best, own = advice.best, advice.own[0]
    assert best is not None and best.candidate.outcome is not None
    out.print(Text("\nBeside narrows' own best plan, under the same host costs", "bold"))
    if own.candidate.outcome is not None:
        mine, its = own.candidate.outcome.figures, best.candidate.outcome.figures
        out.print(
            f"{own.candidate.mesh}, {own.candidate.layout}: TTFT {_change(mine.ttft_ms.mean, its.ttft_ms.mean)}, TPOT "
            f"{_change(mine.tpot_ms.mean, its.tpot_ms.mean)}, output tokens per second "
            f"{_change(mine.output_throughput, its.output_throughput)}",
            markup=False,
        )
        same = any(
            trial.candidate.mesh == own.candidate.mesh and trial.candidate.outcome is not None
            for trial in advice.trials
        )
        if not same:
            out.print(f"missing in {title}: the mesh {own.candidate.mesh}", markup=False)
    for step in costing:
        shape = step.shape
        out.print(
            f"{shape.phase} steps of {shape.rows.total} rows ({step.share:.0%} of the time), on the same mesh: "
            f"{1e3 * step.engine_s:.2f} ms, {100 * step.more:+.1f} % against {1e3 * step.best_s:.2f} ms",
            markup=False,
        )
        for each in step.missing:
            out.print(f"  missing: {each.words} ({100 * each.worth:.1f} %)", markup=False)


def _change(mine: float, its: float) -> str:
    return f"{100 * (mine / its - 1):+.1f} %"


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value / total:.1%}" for name, value in ordered if value / total >= 0.005)


def print_comparison(found: Comparison, out: Console) -> None:
    """Print predicted beside measured."""
    out.print(Text(f"\nMeasured: {found.file} ({found.kind}), beside the prediction for {found.way}", "bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "predicted", "measured", "predicted / measured", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in found.rows:
        inside = {True: "within the band", False: "outside the band", None: ""}[row.inside]
        table.add_row(row.figure, f"{row.predicted:.2f}", f"{row.measured:.2f}", f"x {row.ratio:.2f}", inside)
    out.print(table)
    for line in found.words:
        out.print(line, markup=False)
