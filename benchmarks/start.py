"""Seconds from the command to the first token of `narrows generate`, several source trees in turns.

    python benchmarks/start.py MODEL [--tree SRC]... [--rounds 5] [--prompt TEXT] [-- options of narrows generate]

A tree is a folder with the package narrows in it; the first round, which warms the page cache, is not counted. Beside
the wall clock stands the processor time of the command and its ranks, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import narrows

HERE = Path(narrows.__file__).parents[1]


def one(tree: Path, command: list[str]) -> tuple[float, float]:
    """Seconds until the first byte of a text, and processor seconds until the command has ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "narrows", "generate", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tree)},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        error = process.stderr.read().decode()
    if process.returncode or not first:
        sys.exit(f"{tree}: {error}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tree", type=Path, action="append", help="repeatable (default: this one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="w7 w8 w9", help="of few tokens (default: three of make_mini.py)")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    trees: list[Path] = args.tree or [HERE]
    command = [args.model, "--quiet", "--max-tokens", "2", "--prompt", args.prompt, *sys.argv[end + 1 :]]
    seen: dict[Path, list[tuple[float, float]]] = {tree: [] for tree in trees}
    for number in range(args.rounds + 1):
        for tree in trees:
            if (found := one(tree, command)) and number:
                seen[tree].append(found)
    for tree, found in seen.items():
        walls, cpus = zip(*found, strict=True)
        each = " ".join(f"{wall:.2f}" for wall in walls)
        print(f"{tree}: first token after {median(walls):.2f} s ({each}), {median(cpus):.2f} s of processor time")


if __name__ == "__main__":
    main()
