"""What the first step of a plan-cache bucket pays for its plan: the search on the host, and binding on the ranks.

    python benchmarks/first_seen_plans.py MODEL [--tp 2] [--dp 1] [--ranks processes] [--warm S]

Starts an engine with random weights, and asks for the plans of decode steps of 1, 2, 3, 4, 6, 8 ... rows and of prefill
steps, as the first step of each bucket would. Milliseconds: of the search on the host; until the ranks have the plan
and have bound it, less an empty call's round trip; and of the step then. ``--warm``: plans are made for so long before,
while the ranks load, as a server does. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from narrows.calibrate.step_work import StepWork
from narrows.engine.calls import RankWorker
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.plan.plan import Plan

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
    engine_config = EngineConfig(
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
    with Engine(resolve(engine_config), warm_s=args.warm) as engine:
        start_s = perf_counter() - started
        plans = engine.plans.values()
        engine.ranks.submit(RankWorker.prepare, plans).result()
        bind_s = perf_counter() - started - start_s
        found = [measure(engine, phase, rows) for phase, rows in STEPS]
    report(found, start_s=start_s, plans_made=len(plans), bind_s=bind_s, args=args)


def measure(engine: Engine, phase: str, rows: int) -> dict[str, Any]:
    """One bucket: milliseconds of the search, of binding, and of a step (the median of 5)."""
    limits, config = engine.resolved.limits, engine.resolved.config
    work = StepWork(rows=rows, phase=phase, context=64 if phase == "decode" else 0)
    batch = work.batch(engine.resolved.mesh.num_groups, limits.page_size, config.vocab_size)

    def prepared(*plans: Plan) -> float:
        start = perf_counter()
        engine.ranks.submit(RankWorker.prepare, plans).result()
        return 1e3 * (perf_counter() - start)

    def stepped() -> float:
        start = perf_counter()
        engine.submit(batch, plan=plan).result()
        return 1e3 * (perf_counter() - start)

    start = perf_counter()
    plan = engine.plans.plan_for(batch)
    search = 1e3 * (perf_counter() - start)
    empty = median(prepared() for _ in range(5))
    bind = max(prepared(plan) - empty, 0.0)
    step = median(stepped() for _ in range(5))
    return {"phase": phase, "rows": rows, "search_ms": search, "bind_ms": bind, "step_ms": step}


def report(found: list[dict[str, Any]], **facts: Any) -> None:
    """The table, and the line of JSON."""
    args = facts.pop("args")
    warm = f", plans made for {args.warm:g} s" if args.warm else ""
    table = Table(title=f"{args.model}, dp {args.dp} x tp {args.tp}, {args.ranks}{warm}", title_justify="left")
    for name in ("step", "search ms", "bind ms", "both ms", "step ms"):
        table.add_column(name, justify="right")
    for one in found:
        times = (one["search_ms"], one["bind_ms"], one["search_ms"] + one["bind_ms"], one["step_ms"])
        table.add_row(f"{one['phase']} {one['rows']}", *(f"{ms:.2f}" for ms in times))
    Console().print(table)
    print(json.dumps({"bench": "first_seen_plans", **vars(args), **facts, "results": found}))


if __name__ == "__main__":
    main()
