"""Attention groups on CPU ranks: the servers of two checkouts in turns under the same loads, medians and ratios.

    git worktree add --detach OTHER e6bbb16
    python benchmarks/make_mini.py FOLDER
    python benchmarks/groups.py OTHER --model FOLDER [--loads prefixes,lengths] [--rounds 5] [--rate 1.5]

Each round starts the other checkout's `narrows serve --dp 2`, sends it the load with this checkout's `narrows bench
serve`, ends it, and does the same with this checkout's; every second round the other way round. The compiled library
must be built in both, and the model needs a tokenizer, else no first token is seen. ``prefixes``: 10 prefixes of 1,024
tokens, which the cache of one group does not hold all; ``lengths``: prompts of 50 to 950 tokens in bursts, no prefixes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parents[1]
_LOADS = {
    "prefixes": "--num-requests 160 --num-prefixes 10 --prefix-length 1024 --input-length 32 --output-length 16",
    "lengths": "--num-requests 60 --input-length 500 --spread 0.9 --output-length 16 --burstiness 0.2",
}
_IDLE_S = 6.0
"""Until the load: what a server that has been up for a while has done already (its warm-up)."""
_FIGURES = {
    "output tokens per second": lambda found: found["output_throughput"],
    "TTFT mean, ms": lambda found: found["ttft_ms"]["mean"],
    "TTFT p99, ms": lambda found: found["ttft_ms"]["p99"],
    "TPOT mean, ms": lambda found: found["tpot_ms"]["mean"],
    "ITL p99, ms": lambda found: found["itl_ms"]["p99"],
    "E2E mean, ms": lambda found: found["e2e_ms"]["mean"],
    "prompt tokens cached, %": lambda found: 100 * found["cached_tokens"] / found["input_tokens"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--model", default="narrows-demo", help="a checkpoint with a tokenizer (default %(default)s)")
    parser.add_argument("--kv-tokens", default="10000", help="per group (default %(default)s)")
    parser.add_argument("--loads", default=",".join(_LOADS), help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", default="1.5", help="requests per second (default %(default)s)")
    parser.add_argument("--num-requests", type=int, default=0, help="other than the load has")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    serve = f"serve {args.model} --dp 2 --tp 1 --kv-tokens {args.kv_tokens} --port 0".split()
    trees = {"other": args.other.resolve(), "here": _HERE}
    document = {}
    for name in args.loads.split(","):
        load = [*_LOADS[name].split(), "--rate", args.rate]
        load += ["--num-requests", str(args.num_requests)] if args.num_requests else []
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for turn in range(args.rounds):
            for which in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                runs[which].append(run(trees[which], serve, load))
                print(f"... {name}, round {turn + 1}, {which}: {words(runs[which][-1])}", file=sys.stderr, flush=True)
        document[name] = runs
        table(name, runs)
    print(json.dumps(document))


def run(tree: Path, serve: list[str], load: list[str]) -> dict[str, Any]:
    """The figures of one load on a new server of this checkout."""
    command = [sys.executable, "-m", "narrows", *serve]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(tree), cwd=tree
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        url = next((word for word in ready.split() if word.startswith("http://")), None)
        if url is None:
            raise SystemExit(f"the server of {tree} did not start; run it by hand: {' '.join(command)}")
        time.sleep(_IDLE_S)
        bench = [sys.executable, "-m", "narrows", "bench", "serve", "--url", url, "--warmup", "4", *load, "--json"]
        done = subprocess.run(bench, capture_output=True, text=True, check=True, env=environment(_HERE))
        figures: dict[str, Any] = json.loads(done.stdout)["figures"]
        return figures
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src")}


def words(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {figure(found):.1f}" for name, figure in _FIGURES.items())


def table(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over rounds, and here over other."""
    print(f"\n{name:26}{'other':>10}{'here':>10}{'ratio':>8}   rounds, other / here")
    for title, figure in _FIGURES.items():
        values = {which: [figure(found) for found in each] for which, each in runs.items()}
        other, here = statistics.median(values["other"]), statistics.median(values["here"])
        ratio = f"{here / other:.3f}" if other else ""
        each = " / ".join(" ".join(f"{value:.0f}" for value in sorted(values[which])) for which in ("other", "here"))
        print(f"{title:26}{other:10.1f}{here:10.1f}{ratio:>8}   {each}", flush=True)


if __name__ == "__main__":
    main()
