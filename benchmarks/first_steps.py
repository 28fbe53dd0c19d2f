"""What the first steps of a fresh engine cost: a first request, and decode steps op by op, captured and replayed.

    python benchmarks/first_steps.py MODEL [--tp 2] [--ranks processes] [--rows 2,8,18]

Starts an engine with random weights and runs one request of 64 tokens: seconds to load, milliseconds to its first token
and between those after it. Then, by rows, decode steps that are new to it: milliseconds of a step that runs
op by op (median of 6), of the one that is captured, and of replayed ones (median of 6). Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

from narrows.calibrate.step_work import StepWork, run_steps
from narrows.engine.calls import RankWorker
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine

_TIMES = 6


class NoCapture:
    """A wrap around every operation, so that no step is captured."""

    def __init__(self, worker: Any) -> None:
        pass

    def __call__(self, layer: Any, step: Any, reads: Any, writes: Any, operation: Any) -> Any:
        return lambda registers, frame: operation(registers, frame)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ranks", default="processes")
    parser.add_argument("--rows", default="2,8,18", help="of the decode steps (default %(default)s)")
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        tp=args.tp,
        ranks=args.ranks,
        dtype="bfloat16",
        load_format="dummy",
        max_context=512,
        kv_tokens=8192,
        device="cpu-core",
    )
    start = perf_counter()
    with Engine(resolve(config)) as engine:
        ready = perf_counter()
        engine.add(tuple(range(1, 65)), 12)
        ends = [ready, *(perf_counter() for _ in engine.run())]
        tokens = [1e3 * (end - before) for before, end in pairwise(ends)]
        counts = [int(text) for text in args.rows.split(",")]
        engine.instrument(importlib.import_module("first_steps").NoCapture)  # ranks know it by that name
        op_by_op = {rows: median(steps(engine, rows)[1:]) for rows in counts}
        engine.instrument(None)
        found = {}
        for rows in counts:
            first, *others = steps(engine, rows)
            found[rows] = {"op by op": op_by_op[rows], "captured": first, "replayed": median(others)}
    print(f"loaded in {ready - start:.1f} s; ms of the first tokens:", *(f"{ms:.0f}" for ms in tokens))
    for rows, each in found.items():
        print(f"decode, {rows} rows, ms:", ", ".join(f"{name} {ms:.1f}" for name, ms in each.items()))
    print(json.dumps({"bench": "first_steps", **vars(args), "tokens_ms": tokens, "steps_ms": found}))


def steps(engine: Engine, rows: int) -> list[float]:
    """Milliseconds of some steps of so many rows, one after the other; the plan of the first is bound before."""
    batch = StepWork(rows=rows, phase="decode", context=64).batch_for(engine)
    plan = engine.plans.plan_for(batch)
    engine.ranks.submit(RankWorker.prepare, (plan,)).result()
    return [1e3 * (end - start) for start, end in (run_steps(engine, batch, plan, 1) for _ in range(_TIMES + 1))]


if __name__ == "__main__":
    main()
