"""Prints simulations: the figures of one, with its time and the sources of its prices; and many, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrows.cli.loads import figures_table
from narrows.sched.stats import Bound, SchedulerStats
from narrows.sim.engine import Outcome
from narrows.sim.search import Candidate, Target
from narrows.workload.fairness import Fairness

__all__ = ["print_candidate", "print_ranking", "print_unfit"]

_LEAST_SHARE = 0.005
"""Smaller shares of the time are not printed."""


def print_unfit(candidates: Sequence[Candidate], out: Console) -> None:
    """Print a warning if candidates do not fit memory; the ranking has the reason of each."""
    unfit = [candidate for candidate in candidates if candidate.refusal.startswith("does not fit")]
    if not unfit:
        return
    meshes = ", ".join(dict.fromkeys(str(candidate.mesh) for candidate in unfit))
    what = f"{len(unfit)} of {len(candidates)} ({meshes}) do not fit memory; the first {unfit[0].refusal}"
    out.print(f"WARNING: {what}\n", style="bold", markup=False, highlight=False)


def print_candidate(candidate: Candidate, title: str, target: Target, out: Console) -> None:
    """Print the results of one mesh and layout."""
    outcome = candidate.outcome
    where = f"{candidate.mesh}, {candidate.layout}"
    if outcome is None:
        out.print(f"{where}: {candidate.refusal}\n", markup=False)
        return
    out.print(figures_table(outcome.figures, f"{title}; {where}"))
    if outcome.fairness is not None:
        out.print(_clients(outcome.fairness))
        out.print(_fairness_words(outcome.fairness), markup=False)
    for error, count in outcome.figures.errors.items():
        out.print(f"{count} can never run: {error}", markup=False)
    if target.is_set:
        out.print(_target_words(target, outcome), markup=False)
    for line in _lines(candidate, outcome):
        out.print(line, markup=False)
    if outcome.plans:
        out.print(_plans(outcome))
    out.print("")


def _clients(found: Fairness) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client", overflow="fold")
    for name in ("requests", "tokens out", "TTFT median, ms", "TTFT p99, ms", "E2E median, ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.by_client:
        times = (each.ttft_ms.median, each.ttft_ms.p99, each.e2e_ms.median)
        row = (str(each.requests), str(each.output_tokens), *(f"{value:.1f}" for value in times))
        table.add_row(Text(each.name), *row)
    return table


def _fairness_words(found: Fairness) -> str:
    if not found.clients:
        return "running slots: no client waited while another ran"
    return (
        f"running slots while texts waited: Jain's index {found.jain:.3f} over {found.clients} clients; "
        f"the least that one had is {found.least:.0%} of its fair share"
    )


def _target_words(target: Target, outcome: Outcome) -> str:
    targets, reached = (target.ttft_s, target.tpot_s), target.reached(outcome)
    parts = [
        f"{name} {1e3 * found:.1f} ms of {1e3 * most:g}"
        for name, most, found in zip(("TTFT", "TPOT"), targets, reached, strict=True)
        if most is not None
    ]
    verdict = "; ".join(target.misses(outcome)) or "met"
    within = f"{target.goodput(outcome):.2f} requests per second within it"
    return f"target for {target.quantile:g} % of the requests: {', '.join(parts)}: {verdict}; {within}"


def _lines(candidate: Candidate, outcome: Outcome) -> list[str]:
    stats, memory = outcome.stats, candidate.memory
    idle = 1 - outcome.busy_s / outcome.figures.duration_s if outcome.figures.duration_s else 0.0
    used = outcome.kv_pages_most / stats.kv_pages
    lines = [f"time in {stats.steps} steps: {_shares(outcome.seconds)}; idle {max(idle, 0.0):.1%} of the duration"]
    if any(stats.idle_rows):
        lines.append(f"rows that groups waited for: {', '.join(map(str, stats.idle_rows))}")
    lines.append(
        f"KV cache: {candidate.kv_tokens} tokens per attention group; most pages in use {outcome.kv_pages_most} of "
        f"{stats.kv_pages} ({used:.0%}); {stats.preemptions} preemptions{_by_group(stats.group_preemptions)}"
    )
    lines.append(_bound(stats))
    if memory is not None:
        lines.append(
            f"memory per rank: weights {memory.weights / 1e9:.1f} GB, KV cache "
            f"{candidate.kv_tokens * memory.kv_per_token / 1e9:.1f} GB, of {memory.usable / 1e9:.1f} GB usable; "
            f"weight sharding: {candidate.sharding}"
        )
    lines.append(f"prices rest on (of the time): {_shares(outcome.sources)}")
    return lines


def _bound(stats: SchedulerStats) -> str:
    """The limits that kept requests waiting, and in what share of the steps."""
    names = {
        Bound.ROWS: "rows (--max-rows)",
        Bound.REQUESTS: "requests per group (--requests-per-group)",
        Bound.KV_PAGES: "KV pages (--kv-tokens)",
    }
    parts = []
    for bound, name in names.items():
        if count := stats.bound_steps[bound]:
            short = [f"{steps / stats.steps:.1%}" for steps in stats.short_steps] if bound is Bound.KV_PAGES else []
            parts.append(f"{name} in {count / stats.steps:.1%}{_by_group(short)}")
    return f"limits that kept a request waiting, of the steps: {', '.join(parts) or 'none'}"


def _by_group(values: Sequence[object]) -> str:
    return f" (by group: {', '.join(map(str, values))})" if len(values) > 1 and any(values) else ""


def _shares(seconds: Mapping[str, float]) -> str:
    """Shares of the total, the largest first."""
    total = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value / total:.1%}" for name, value in parts if value / total >= _LEAST_SHARE)


def _plans(outcome: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("steps", "of the time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("how rows travel in most layers", overflow="fold")
    for use in outcome.plans:
        share = f"{use.seconds / outcome.busy_s:.1%}" if outcome.busy_s else ""
        table.add_row(str(use.steps), share, use.phase, Text(use.words))
    return table


def print_ranking(candidates: Sequence[Candidate], target: Target, out: Console) -> None:
    """Print a row per candidate, in this order, and how it compares with the first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("mesh", "layout"):
        table.add_column(name, no_wrap=True)
    numbers = ["out tok/s", "per rank", "req/s", *(["goodput"] if target.is_set else [])]
    for name in (*numbers, f"TTFT p{target.quantile:g}", f"TPOT p{target.quantile:g}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    best = candidates[0].outcome
    for candidate in candidates:
        outcome, mesh = candidate.outcome, candidate.mesh
        if outcome is None:
            table.add_row(str(mesh), candidate.layout, *("",) * (len(numbers) + 2), Text(candidate.refusal))
            continue
        found = outcome.figures
        ttft_s, tpot_s = target.reached(outcome)
        table.add_row(
            str(mesh),
            candidate.layout,
            f"{found.output_throughput:.1f}",
            f"{found.output_throughput / mesh.size:.1f}",
            f"{found.request_throughput:.2f}",
            *([f"{target.goodput(outcome):.2f}"] if target.is_set else []),
            *(f"{1e3 * value:.1f}" for value in (ttft_s, tpot_s)),
            Text("; ".join(target.misses(outcome)) or _beside(outcome, best)),
        )
    out.print(table)


def _beside(outcome: Outcome, best: Outcome | None) -> str:
    if best is None or outcome is best:
        return "best"
    ratio = outcome.figures.output_throughput / best.figures.output_throughput
    if abs(ratio - 1) < 5e-4:
        return f"as fast; E2E x {outcome.figures.e2e_ms.mean / best.figures.e2e_ms.mean:.3f}"
    return f"x {ratio:.3f} of the best"
