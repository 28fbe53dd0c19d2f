"""What planning costs the processor: one plan of deepseek-v3's 61 layers, and the whole `narrows plan` command.

    python benchmarks/planning.py [--rounds 5]

Processor seconds, not wall time, so that other work on the machine changes little; the least of the rounds. The command
runs once before, so that its modules are compiled, as those of an installed package are.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from time import process_time

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh, split_evenly
from narrows.plan.planner import Deployment, Planner

COMMAND = "plan deepseek-v3 --device h20 --dp 1 --tp 8 --rows 32768 --dtype fp8 --json"


def plan_ms(dp: int, tp: int, rows: int) -> float:
    """Of one plan that nothing was kept for."""
    mesh = Mesh.of(dp=dp, tp=tp)
    deployment = Deployment(config=preset("deepseek-v3"), mesh=mesh, device=device("h100"), dtype="fp8")
    shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=4096)
    start = process_time()
    Planner(deployment, WeightSharding()).plan(shape)
    return 1e3 * (process_time() - start)


def command_s() -> float:
    """Of the command, from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "narrows", *COMMAND.split()], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    for dp, tp in ((1, 8), (2, 4), (8, 1)):
        print(
            f"a plan of 61 layers on dp {dp} x tp {tp}: {min(plan_ms(dp, tp, 16384 - each) for each in rounds):.1f} ms"
        )
    command_s()
    print(f"narrows {COMMAND}: {min(command_s() for _ in rounds):.2f} s")


if __name__ == "__main__":
    main()
