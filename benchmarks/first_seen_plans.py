"""What the first step of a plan-book bucket costs over the next one of the same bucket, and where that goes.

    python benchmarks/first_seen_plans.py MODEL [--tp 2] [--dp 1] [--ranks processes] [--warm S]

Starts an engine with random weights and runs decode steps of 1, 2, 3, 4, 6, 8 ... rows and prefill steps, each twice by
hand: the first time in its bucket, and again. Prints milliseconds of the search on the host, of both steps as the host
sees them, and the difference: the pause. ``--warm``: plans are made for so long before, as a server does. Ends in one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from narrows.bench.layer import LayerWork
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine

STEPS = [("decode", rows) for rows in (1, 2, 3, 4, 6, 8, 12, 16)] + [("prefill", rows) for rows in (64, 128, 256, 512)]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ranks", default="processes")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--warm", type=float, default=0.0, metavar="S")
    args = parser.parse_args()
    asked = EngineConfig(
        model=args.model,
        dp=args.dp,
        tp=args.tp,
        ranks=args.ranks,
        layout=args.layout,
        load_format="dummy",
        max_context=1024,
        kv_tokens=16 * 1100,
    )
    started = perf_counter()
    with Engine(resolve(asked)) as engine:
        ready = perf_counter()
        warmed = 0
        if args.warm:
            warmed = engine.warm(args.warm)
            engine.prepare(engine.plans())
        warm_s = perf_counter() - ready
        found = [measure(engine, phase, rows) for phase, rows in STEPS]
    report(found, start_s=ready - started, warm_s=warm_s, warmed=warmed, args=args)


def measure(engine: Engine, phase: str, rows: int) -> dict[str, Any]:
    """One bucket: milliseconds of the search, of the first step and of the next ones."""
    limits, config = engine.resolved.limits, engine.resolved.config
    work = LayerWork(rows=rows, phase=phase, context=64 if phase == "decode" else 0)
    batch = work.batch(engine.resolved.mesh.num_groups, limits.page_size, config.vocab_size)

    def run() -> tuple[float, float]:
        start = perf_counter()
        plan = engine.plan_for(batch)
        planned = perf_counter()
        engine.submit(batch, plan=plan).result()
        return 1e3 * (planned - start), 1e3 * (perf_counter() - start)

    search, first = run()
    again = median(run()[1] for _ in range(7))
    return {"phase": phase, "rows": rows, "search_ms": search, "first_ms": first, "again_ms": again}


def report(found: list[dict[str, Any]], **facts: Any) -> None:
    """The table, and the line of JSON."""
    table = Table(title=f"{facts['args'].model}, dp {facts['args'].dp} x tp {facts['args'].tp}, {facts['args'].ranks}")
    for name in ("step", "search ms", "first ms", "again ms", "pause ms"):
        table.add_column(name, justify="right")
    for one in found:
        pause = one["first_ms"] - one["again_ms"]
        times = (one["search_ms"], one["first_ms"], one["again_ms"], pause)
        table.add_row(f"{one['phase']} {one['rows']}", *(f"{ms:.2f}" for ms in times))
    Console().print(table)
    args = vars(facts.pop("args"))
    print(json.dumps({"bench": "first_seen_plans", **args, **facts, "results": found}))


if __name__ == "__main__":
    main()
