"""Published serving benchmarks beside `narrows simulate`: time to first token, and time per output token.

    python benchmarks/published_runs.py [--only TEXT] [--engine none] [--workers 2]

The runs are those of ``published_runs.csv``: deployment, engine and version, load, and the published times. They are
from the sample of public results in NVIDIA AIConfigurator (``silicon_sample.csv``, Apache-2.0), most of them by
SemiAnalysis InferenceX; the two on two hosts are of tenstorrent/tt-inference-server issue 356. Where ``spread`` is not
0 lengths were drawn between 0.8 and 1.0 of the nominal ones. Each run is simulated with fewer requests than the
publication sent, as one command of `narrows simulate`. ``--engine none`` leaves out what engines add to their kernels.
Prints a line per run, and by group the median ratio (simulated over published), the geometric mean of the error, and
how many lie within 15 %; by engine, on one node, also the band that ``SERVED`` of ``cost/bands.py`` has: between which
factors of the simulated figure 8 of 10 published ones lie.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNS = Path(__file__).with_suffix(".csv")
MEAN_OF_NOMINAL = 0.9
"""Of the nominal length, where lengths are drawn between 0.8 and 1.0 of it."""

Run = Mapping[str, str]


def arguments(run: Run, engine: str) -> list[str]:
    """The flags of `narrows simulate` for one run."""
    concurrency = int(run["concurrency"])
    length = MEAN_OF_NOMINAL if float(run["spread"]) else 1.0
    flags = {
        "device": run["device"],
        "dp": run["dp"],
        "tp": run["tp"],
        "dtype": run["dtype"],
        "kv-dtype": run["kv_dtype"],
        "engine": engine or run["engine"],
        "layout": "norm-before-gather" if run["dp"] != "1" else "all-reduce",
        "concurrency": str(concurrency),
        "requests-per-group": run["max_requests"] or str(max(256, concurrency)),
        "num-requests": str(max(32, 10 * concurrency)),
        "input-length": str(int(length * int(run["input_tokens"]))),
        "output-length": str(int(length * int(run["output_tokens"]))),
        "spread": run["spread"],
        "max-rows": run["max_rows"],
        "max-context": "10000",
    }
    given = ("experts", "nodes", "recv_interval", "batch_wait")
    flags |= {name.replace("_", "-"): run[name] for name in given if run[name]}
    return [
        "simulate",
        run["model"],
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
        "--no-prefix-cache",
        "--json",
    ]


def on(run: Run) -> str:
    """The device, and its nodes if there are several."""
    return f"{run['device']} on {run['nodes']}" if run["nodes"] else run["device"]


def simulated(run: Run, engine: str) -> tuple[float, float] | str:
    """Mean milliseconds (TTFT, TPOT), or why there are none."""
    done = subprocess.run(
        [sys.executable, "-m", "narrows", *arguments(run, engine)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    figures = json.loads(done.stdout)["candidates"][0]["figures"]
    return figures["ttft_ms"]["mean"], figures["tpot_ms"]["mean"]


def summary(ratios: Sequence[float]) -> str:
    error = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in ratios))
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    return f"median x {statistics.median(ratios):.2f}, error x {error:.2f}, within 15 %: {within} of {len(ratios)}"


def band(ratios: Sequence[float]) -> str:
    """The tenth and the ninetieth percentile of published over simulated."""
    tenths = statistics.quantiles([1 / ratio for ratio in ratios], n=10, method="inclusive")
    return f"8 of 10 published: {tenths[0]:.2f} to {tenths[-1]:.2f} x the simulated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose description contains this")
    parser.add_argument("--engine", default="", help="in place of each run's own; none: kernels alone")
    parser.add_argument("--workers", type=int, default=2, help="simulations at once (default %(default)s)")
    args = parser.parse_args()
    with RUNS.open() as lines:
        runs = list(csv.DictReader(lines))
    words = {
        id(run): f"{run['model']} {run['dtype']} {int(run['dp']) * int(run['tp'])} x {on(run)} dp {run['dp']} "
        f"{run['engine']} {run['version']} {run['input_tokens']}/{run['output_tokens']} at {run['concurrency']}"
        for run in runs
    }
    runs = [run for run in runs if args.only in words[id(run)]]
    tpot: defaultdict[str, list[float]] = defaultdict(list)
    ttft: defaultdict[str, list[float]] = defaultdict(list)
    with ThreadPoolExecutor(args.workers) as pool:
        for run, found in zip(runs, pool.map(lambda run: simulated(run, args.engine), runs), strict=True):
            if isinstance(found, str):
                print(f"{words[id(run)]}: {found}", flush=True)
                continue
            first, each = (ms / float(run[name]) for ms, name in zip(found, ("ttft_ms", "tpot_ms"), strict=True))
            several = ["several nodes"] if run["nodes"] else [f"engine {run['engine']}", "one node"]
            for group in (f"{run['model']} on {on(run)}", *several):
                ttft[group].append(first)
                tpot[group].append(each)
            print(
                f"{words[id(run)]:78} TPOT {run['tpot_ms']:>5} {found[1]:6.1f} x {each:4.2f}   "
                f"TTFT {run['ttft_ms']:>5} {found[0]:6.0f} x {first:4.2f}",
                flush=True,
            )
    for group in sorted(tpot, key=lambda name: (name in ("one node", "several nodes"), name)):
        print(f"\n{group}\n  TPOT {summary(tpot[group])}\n  TTFT {summary(ttft[group])}")
        if group.startswith("engine") and len(tpot[group]) > 1:
            print(f"  TPOT {band(tpot[group])}\n  TTFT {band(ttft[group])}")


if __name__ == "__main__":
    main()
