"""The main job on two real models: plan, generate on two ranks in two ways, verify and evaluate, say where time went.

Runs the same `narrows` commands a user would type, and prints each before its output. The models are narrows-demo,
which comes along and has DeepSeek-V3's architecture, so that the published layouts run as they were published; and
SmolLM2-135M-Instruct (Apache-2.0), a chat model taken from a Python package and converted once into the user's cache.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

DEMO = "narrows-demo"
SUMS = ("What is 47 + 38?", "Tom has 25 apples. Tom buys 17 more and gives 9 to Anna. How many apples are left?")
CHATS = ("What is the capital of France, and what is it known for?", "Give me three tips for a good night's sleep.")


def narrows(*args: str) -> None:
    """Run one command as a user would; its output appears as it comes."""
    print(f"\n$ {shlex.join(['narrows', *args])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "narrows", *args], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def prompts(texts: tuple[str, ...]) -> list[str]:
    return [flag for text in texts for flag in ("--prompt", text)]


def main() -> None:
    started = time.perf_counter()
    print("# 1. The plan: which rank holds which rows, and what crosses ranks, in what width")
    narrows("plan", DEMO, "--device", "cpu-core", "--tp", "2", "--rows", "64", "--context", "64")

    print("\n# 2. Sums on two ranks that share every layer, in the published layout: reduce-scatter, norm and low-rank")
    print("#    projection on half the rows each, then gather its narrow output")
    layout = ("--layout", "attn-tp-input-scattered")
    narrows("generate", DEMO, "--tp", "2", *layout, "--chat", "--max-tokens", "48", *prompts(SUMS))
    print("\n# 3. The same on two ranks that each attend to their own prompt: norm before the gather; where time went")
    layout = ("--layout", "norm-before-gather")
    narrows("generate", DEMO, "--dp", "2", *layout, "--chat", "--max-tokens", "48", "--profile", *prompts(SUMS))

    print("\n# 4. The proof: every layout gives the numbers of one rank, and the answers")
    narrows("verify", DEMO, "--tp", "2")
    narrows("verify", DEMO, "--dp", "2")
    sample = ("--task", "arithmetic", "--limit", "100", "--one-at-a-time", "8")
    narrows("eval", DEMO, "--tp", "2", "--layout", "all-reduce", "--layout", "auto", *sample)

    print("\n# 5. A chat model: fetched and converted once, then kept in your cache", flush=True)
    convert = subprocess.run(
        [sys.executable, "-m", "narrows", "convert", "demo"], check=False, stdout=subprocess.PIPE, text=True
    )
    if convert.returncode:
        sys.exit(convert.returncode)
    narrows("generate", convert.stdout.strip(), "--tp", "2", "--chat", "--max-tokens", "64", *prompts(CHATS))
    print(f"\nAll of this took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
