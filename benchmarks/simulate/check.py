"""A simulation beside the server that it simulates: the same loads, measured and predicted.

    python benchmarks/simulate/check.py dsv3-mini --tp 2 --device cpu-core
    python benchmarks/simulate/check.py MODEL --tp 2 --device PROFILE --trace requests.csv

For each load a server is started (`serve_timed.py`), the load is sent by `narrows bench serve` a few times, and it is
simulated twice: with the mean seconds of the steps that the server ran in the median run in place of prices, and with
the prices of --device. The first says how well the simulator does, whatever the prices; the second how well both do.
Beside it stands how fast the machine was before and after each run. Random weights, no prefix cache.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from narrows.calibrate.rates import Calibrator
from narrows.engine.config import EngineConfig, resolve

_LENGTHS = ["--input-length", "256", "--output-length", "32"]
_LOADS = {
    "closed": ["--num-requests", "16", "--input-length", "256", "--output-length", "32", "--concurrency", "8"],
    "rate": [
        "--num-requests",
        "24",
        "--input-length",
        "256",
        "--output-length",
        "32",
        "--rate",
        "3",
        "--spread",
        "0.5",
    ],
}
_TRACE = ["--num-requests", "16", "--scale-lengths", "0.2", "--speed", "10"]
_WARMUP = 16
"""Requests of the load sent before it, which do not count: they meet cold code."""
_IDLE_S = 6.0
"""Until the first of them: what a server that has been up for a while has done already (its warm-up)."""
_NARROWS = [sys.executable, "-m", "narrows"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measured and simulated loads side by side.")
    parser.add_argument("model")
    parser.add_argument("--dp", default="1")
    parser.add_argument("--tp", default="2")
    parser.add_argument("--device", default="cpu-core", help="whose prices server and simulation plan by")
    parser.add_argument("--kv-tokens", default="20000")
    parser.add_argument("--trace", default="", help="a third load: 16 requests of it, a fifth as long, 10 x as fast")
    parser.add_argument("--repeats", type=int, default=3, help="how often each load is sent; its median run counts")
    args = parser.parse_args()
    loads = _LOADS | ({"trace": ["--trace", args.trace, *_TRACE]} if args.trace else {})
    flags = f"--dp {args.dp} --tp {args.tp} --kv-tokens {args.kv_tokens} --no-prefix-cache"
    deployed = [*flags.split(), "--device", args.device]
    config = EngineConfig(model=args.model, dp=int(args.dp), tp=int(args.tp), dtype="bfloat16", ranks="processes")
    found = {}
    print(f"{'load':8}{'':18}{'out tok/s':>10}{'':>9}{'E2E, ms':>10}{'':>9}{'pace':>9}")
    with Calibrator(resolve(config)) as calibrator:
        for name, load in loads.items():
            with tempfile.TemporaryDirectory() as folder:
                steps = Path(folder) / "steps"
                measured, pace = _measure(args.model, deployed, load, args.repeats, steps, calibrator)
                simulate = [*_NARROWS, "simulate", args.model, *deployed, *load, "--json"]
                by_steps = _figures([*simulate, "--step-times", str(steps)])
            by_prices = _figures(simulate)
            each = {"measured": measured, "by measured steps": by_steps, f"by {Path(args.device).stem}": by_prices}
            found[name] = {**each, "pace": pace}
            for title, figures in each.items():
                print(_line(name, title, figures, measured), pace if figures is measured else "")
                name = ""
    print(json.dumps(found))


def _measure(
    model: str, deployed: list[str], load: list[str], repeats: int, steps: Path, calibrator: Calibrator
) -> tuple[dict[str, Any], str]:
    """The figures of the median run of a load on a real server, and how fast the machine was meanwhile; the steps that
    the server ran in that run are in ``steps``."""
    timed = str(Path(__file__).with_name("serve_timed.py"))
    command = [sys.executable, timed, str(steps), model, "--load-format", "dummy", "--port", "0", *deployed]
    paces = [calibrator.measure()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    runs: list[dict[str, Any]] = []
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        url = next(word for word in ready.split() if word.startswith("http://"))
        time.sleep(_IDLE_S)
        for run in range(repeats):
            warm_up = _WARMUP if run == 0 else 0
            bench = [*_NARROWS, "bench", "serve", "--url", url, "--warmup", str(warm_up), *load, "--json"]
            done = subprocess.run(bench, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout)["figures"])
            paces.append(calibrator.measure())
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    by_throughput = sorted(range(repeats), key=lambda run: runs[run]["output_throughput"])
    run = by_throughput[repeats // 2]
    size = runs[run]["completed"]
    first = _WARMUP + run * size
    lines = steps.read_text(encoding="utf-8").splitlines()
    of_run = [line for line in lines if first <= json.loads(line)["newest"] < first + size]
    steps.write_text("\n".join(of_run), encoding="utf-8")
    rates = [f"{pace['gemm_flop_per_s'] / 1e9:.0f}" for pace in paces]
    spread = " ".join(f"{runs[run]['output_throughput']:.1f}" for run in by_throughput)
    return runs[run], f" {' '.join(rates)} GFLOP/s before and after each run; runs: {spread}"


def _figures(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)["candidates"][0]["figures"]
    return figures


def _line(name: str, title: str, figures: dict[str, Any], measured: dict[str, Any]) -> str:
    out, e2e = figures["output_throughput"], figures["e2e_ms"]["mean"]
    beside = "" if figures is measured else f"{out / measured['output_throughput'] - 1:+.1%}"
    later = "" if figures is measured else f"{e2e / measured['e2e_ms']['mean'] - 1:+.1%}"
    return f"{name:8}{title:18}{out:10.1f}{beside:>9}{e2e:10.0f}{later:>9}"


if __name__ == "__main__":
    main()
