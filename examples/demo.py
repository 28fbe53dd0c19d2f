"""The main job on a real model: plan, generate on two ranks in two ways, verify the layouts, say where the time went.

Runs the same `narrows` commands a user would type, and prints each before its output. The model is
SmolLM2-135M-Instruct (Apache-2.0), taken from a Python package and converted once into the user's cache.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

PROMPTS = ("What is the capital of France, and what is it known for?", "Give me three tips for a good night's sleep.")


def narrows(*args: str) -> None:
    """Run one command as a user would; its output appears as it comes."""
    print(f"\n$ {shlex.join(['narrows', *args])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "narrows", *args], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    started = time.perf_counter()
    print("# The demo model: fetched and converted once, then kept in your cache", flush=True)
    convert = subprocess.run(
        [sys.executable, "-m", "narrows", "convert", "demo"], check=False, stdout=subprocess.PIPE, text=True
    )
    if convert.returncode:
        sys.exit(convert.returncode)
    model = convert.stdout.strip()
    print(model)

    print("\n# 1. The plan: which rank holds which rows, and what crosses ranks, in what width")
    narrows("plan", model, "--device", "cpu-core", "--tp", "2", "--rows", "64", "--context", "64")

    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    print("\n# 2. Two prompts on two ranks that share every layer (9 heads: 6 on one rank, 3 on the other)")
    narrows("generate", model, "--tp", "2", "--chat", "--max-tokens", "64", *prompts)
    print("\n# 3. The same on two ranks that each attend to their own prompt; and where the time went")
    narrows("generate", model, "--dp", "2", "--chat", "--max-tokens", "64", "--profile", *prompts)

    print("\n# 4. The proof: every layout gives the numbers of one rank")
    narrows("verify", model, "--tp", "2")
    narrows("verify", model, "--dp", "2")
    print(f"\nAll of this took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
