"""A simulation beside the server that it simulates: the same loads, measured and predicted.

    python benchmarks/simulate/check.py dsv3-mini --tp 2 --device cpu-core
    python benchmarks/simulate/check.py MODEL --tp 2 --device PROFILE --trace requests.csv

For each load a server is started (`serve_timed.py`), the load is sent by `narrows bench serve`, and it is simulated
twice: with the mean seconds of the steps that the server ran in place of prices, and with the prices of --device. The
first says how well the simulator does, whatever the prices; the second how well both do. Random weights, no prefix
cache.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
"""Requests of the load sent before it, which do not count: they meet cold code, and steps that are not on tape yet."""
_NARROWS = [sys.executable, "-m", "narrows"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measured and simulated loads side by side.")
    parser.add_argument("model")
    parser.add_argument("--dp", default="1")
    parser.add_argument("--tp", default="2")
    parser.add_argument("--device", default="cpu-core", help="whose prices server and simulation plan by")
    parser.add_argument("--kv-tokens", default="20000")
    parser.add_argument("--trace", default="", help="a third load: 16 requests of it, a fifth as long, 10 x as fast")
    args = parser.parse_args()
    loads = _LOADS | ({"trace": ["--trace", args.trace, *_TRACE]} if args.trace else {})
    flags = f"--dp {args.dp} --tp {args.tp} --kv-tokens {args.kv_tokens} --no-prefix-cache"
    deployed = [*flags.split(), "--device", args.device]
    found = {}
    print(f"{'load':8}{'':18}{'out tok/s':>10}{'':>9}{'E2E, ms':>10}{'':>9}")
    for name, load in loads.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = Path(folder) / "steps"
            measured = _measure(args.model, deployed, load, steps)
            simulate = [*_NARROWS, "simulate", args.model, *deployed, *load, "--json"]
            by_steps = _figures([*simulate, "--step-times", str(steps)])
        by_prices = _figures(simulate)
        found[name] = {"measured": measured, "by measured steps": by_steps, f"by {Path(args.device).stem}": by_prices}
        for title, figures in found[name].items():
            print(_line(name, title, figures, measured))
            name = ""
    print(json.dumps(found))


def _measure(model: str, deployed: list[str], load: list[str], steps: Path) -> dict[str, Any]:
    """The load's figures on a real server; the steps that it ran for it are in ``steps``."""
    timed = str(Path(__file__).with_name("serve_timed.py"))
    command = [sys.executable, timed, str(steps), model, "--load-format", "dummy", "--port", "0", *deployed]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        url = next(word for word in ready.split() if word.startswith("http://"))
        bench = [*_NARROWS, "bench", "serve", "--url", url, "--warmup", str(_WARMUP), *load]
        done = subprocess.run(bench, capture_output=True, text=True, check=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    lines = steps.read_text(encoding="utf-8").splitlines()
    of_load = [line for line in lines if json.loads(line)["newest"] >= _WARMUP]
    steps.write_text("\n".join(of_load), encoding="utf-8")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


def _figures(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["candidates"][0]["figures"]
    return figures


def _line(name: str, title: str, figures: dict[str, Any], measured: dict[str, Any]) -> str:
    out, e2e = figures["output_throughput"], figures["e2e_ms"]["mean"]
    beside = "" if figures is measured else f"{out / measured['output_throughput'] - 1:+.1%}"
    later = "" if figures is measured else f"{e2e / measured['e2e_ms']['mean'] - 1:+.1%}"
    return f"{name:8}{title:18}{out:10.1f}{beside:>9}{e2e:10.0f}{later:>9}"


if __name__ == "__main__":
    main()
