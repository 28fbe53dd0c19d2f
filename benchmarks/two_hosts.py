"""Two hosts of two ranks on this machine, joined by a cable of 1 Gb/s and 0.2 ms: what is predicted, and what is so.

    python benchmarks/two_hosts.py [MODEL] [--rows 2048] [--seconds 60] [--parts calibrate,steps,tokens,serve,cut,slow]

Needs root on Linux with iproute2 (tests/host_rig.py says what is missing), and an idle machine. Each host has half of
the cores. Traffic stays inside the network namespaces that the script makes. It prints, and fails where one is missed:

- calibrate: a profile of 4 ranks on one host, one of two hosts; the plans that `auto` makes by each.
- steps: a prefill step under every named layout and under `auto` with its own weight sharding, interleaved; predicted
  and measured; each collective alone inside a host, between hosts and over both, against the profile's price.
- tokens, serve: texts of one rank, of `generate` on two hosts and of `serve` there, in float32.
- cut, slow: how long after the cable is cut the command ends, what it says, and what it says on a cable of 0.5 Mb/s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from host_rig import HostRig, why_none  # noqa: E402

PORT = 29600
PARTS = ("calibrate", "steps", "tokens", "serve", "cut", "slow")
LEAST_GAIN, MOST_OFF = 1.10, 0.15
LEVELS = ("in a host", "between hosts", "over both")
MESH = ("--dp", "2", "--tp", "2")
PROMPTS = ("--prompt", "Once upon a time", "--prompt", "The sea was calm and", "--max-tokens", "24")


def main() -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="narrows-demo")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each calibration")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="calibrate on few points, and on two hosts alone")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--profiles", default="", help="folder for the two profiles; kept if given")
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.node is not None:
        return _steps_on(args)
    if why := why_none():
        print(f"skipped: {why}")
        return 0
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    split = (tuple(cores[:half]), tuple(cores[half:])) if half else ((), ())
    failed = []
    with ExitStack() as stack:
        folder = args.profiles or stack.enter_context(tempfile.TemporaryDirectory())
        args.profiles = folder
        for part in args.parts.split(","):
            run = dict(zip(PARTS, (_calibrate, _steps, _tokens, _serve, _cut, _slow), strict=True))[part]
            more: dict[str, Any] = {"rate_mbit": 0.5, "mtu": 1500} if part == "slow" else {}
            with HostRig(cores=split, **more) as rig:  # a new one: a fault leaves it broken
                failed += [f"{part}: {line}" for line in run(args, rig)]
    for line in failed:
        print(f"MISSED {line}")
    return bool(failed)


def narrows(*more: str) -> list[str]:
    return [sys.executable, "-m", "narrows", *more]


def on_both(rig: HostRig, command: list[str], **more: Any) -> list[subprocess.Popen[str]]:
    """The command on both hosts, as node 0 and node 1."""
    flags = ["--nnodes", "2", "--master-addr", rig.addresses[0], "--master-port", str(PORT)]
    return [
        subprocess.Popen([*rig.on(node), *command, *flags, "--node-rank", str(node)], text=True, **more)
        for node in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a command on the two hosts ended with {codes}")


# --- profiles, and plans by them


def profile(args: argparse.Namespace, hosts: int) -> Path:
    return Path(args.profiles) / f"{hosts}-host.json"


def _calibrate(args: argparse.Namespace, rig: HostRig) -> list[str]:
    command = narrows(
        "calibrate", args.model, "--num-ranks", "4", "--seconds", str(args.seconds), "--dtype", args.dtype
    )
    command += [*["--quick"] * args.quick, "--out"]
    if not args.quick:
        subprocess.run([*command, str(profile(args, 1))], check=True)
    ended(on_both(rig, [*command, str(profile(args, 2))]))
    plans = [
        _planned(args, profile(args, 2 if args.quick else 1), ()),
        _planned(args, profile(args, 2), ("--nodes", "2x2")),
    ]
    return [] if plans[0] != plans[1] else ["auto makes the same plan on two hosts as on one"]


def _planned(args: argparse.Namespace, file: Path, nodes: tuple[str, ...]) -> list[str]:
    """What `auto` does in a layer, without times."""
    command = narrows("plan", args.model, "--device", str(file), *MESH, "--rows", str(args.rows))
    command += ["--context", "1024", "--dtype", {"float32": "fp32", "bfloat16": "bf16"}[args.dtype]]
    out = subprocess.run([*command, *nodes], check=True, capture_output=True, text=True).stdout
    print(out)
    found = [line for line in out.splitlines() if "weight sharding of auto" in line]
    body = out[out.index("op by op") :].splitlines()
    return found + [" ".join(line.split()[:6]) for line in body if line.startswith(">")]


# --- steps and collectives, measured


def _steps(args: argparse.Namespace, rig: HostRig) -> list[str]:
    own = [sys.executable, str(Path(__file__).resolve()), args.model, "--rows", str(args.rows)]
    own += ["--rounds", str(args.rounds), "--dtype", args.dtype, "--profiles", args.profiles, "--node"]
    processes = [subprocess.Popen([*rig.on(node), *own, str(node)]) for node in (0, 1)]
    codes = [process.wait() for process in processes]
    return [] if not any(codes) else [f"ended with {codes}"]


def _steps_on(args: argparse.Namespace) -> int:
    """On one of the hosts: node 0 measures and prints."""
    from narrows.engine.config import EngineConfig  # noqa: PLC0415
    from narrows.ranks.launch import Launch, Series, announce_end  # noqa: PLC0415
    from narrows.ranks.node import run_series  # noqa: PLC0415

    launch = Launch.of_nodes(world_size=4, num_nodes=2, node=args.node, address=HostRig.addresses[0], port=PORT)
    launch = replace(launch, series=Series())
    if args.node:
        return run_series(launch)
    config = EngineConfig(
        model=args.model,
        dp=2,
        tp=2,
        ranks="processes",
        launch=launch,
        device=str(profile(args, 2)),
        dtype=args.dtype,
        load_format="dummy",
        prefix_cache=False,
    )
    try:
        missed = _measured_steps(args, config)
        _alone(config)
    finally:
        announce_end(launch)
    for line in missed:
        print(f"MISSED {line}")
    return bool(missed)


def _measured_steps(args: argparse.Namespace, config: Any) -> list[str]:
    from narrows.arch.weight_sharding import WeightSharding  # noqa: PLC0415
    from narrows.calibrate.step_work import StepWork, attributed_op_times, run_steps  # noqa: PLC0415
    from narrows.engine.config import resolve  # noqa: PLC0415
    from narrows.engine.core import Engine  # noqa: PLC0415
    from narrows.instruments.op_seconds import OpSeconds  # noqa: PLC0415
    from narrows.plan.named import applicable_layouts  # noqa: PLC0415

    work = StepWork(rows=args.rows, phase="prefill", context=0)
    config = work.limits(config)
    with (
        Engine(resolve(replace(config, layout="all-reduce"), WeightSharding())) as named,
        Engine(resolve(config)) as own,
    ):
        names = applicable_layouts(own.resolved.config, own.resolved.mesh)
        engines = {name: own if name == "auto" else named for name in names}
        batches = {name: work.batch_for(engine) for name, engine in engines.items()}
        plans = {name: work.plan(engine, name, batches[name]) for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.rounds + 1):
            for name in names:
                times = run_steps(engines[name], batches[name], plans[name], 2)
                if turn:
                    seconds[name].append(times[2] - times[1])
        for engine in (named, own):
            engine.instrument(OpSeconds)
        levels: dict[str, dict[str, list[float]]] = {}
        for name in names:
            engines[name].readings()
            run_steps(engines[name], batches[name], plans[name], 4)
            runs = attributed_op_times(engines[name], plans[name])[1:]
            each = [median(run[i] for run in runs) for i in range(plans[name].num_ops)]
            for took, (_, op) in zip(each, plans[name].ops(), strict=True):
                if op.move is not None and op.is_collective:
                    lie = own.resolved.deployment.topology.levels(op.move.groups)[0]
                    where = LEVELS[lie.spans + (lie.per_node > 1 and lie.spans)]
                    where += f", {op.move.algorithm}" if lie.has_two_levels else ""
                    both = levels.setdefault(where, {}).setdefault(name, [0.0, 0.0])
                    both[0] += took
                    both[1] += op.seconds
    table = Table(title=f"prefill of {args.rows} rows, two hosts of two ranks, ms", title_justify="left", box=None)
    for column in ("layout", "measured", "least", "predicted", "off"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for name, plan in plans.items():
        found, predicted = median(seconds[name]), plan.seconds
        row = [found, min(seconds[name]), predicted]
        table.add_row(name, *(f"{1e3 * x:.1f}" for x in row), f"{predicted / found - 1:+.0%}")
    console().print(table)
    missed = _levels(levels)
    best = min((name for name in names if name != "auto"), key=lambda name: median(seconds[name]))
    gain = median(seconds[best]) / median(seconds["auto"])
    print(f"auto is {gain:.2f} x as fast as the fastest named layout, {best}")
    return missed + ([] if gain >= LEAST_GAIN else [f"auto is {gain:.2f} x as fast as {best}, not {LEAST_GAIN}"])


def _levels(levels: dict[str, dict[str, list[float]]]) -> list[str]:
    """Prints what the collectives of each level took in the steps, and were predicted to."""
    table = Table(title="collectives of a step by level, ms (measured, predicted)", title_justify="left", box=None)
    names = list(dict.fromkeys(name for each in levels.values() for name in each))
    for column in ("level", *names, "off, in all"):
        table.add_column(column, justify="left" if column == "level" else "right")
    missed = []
    for where, each in levels.items():
        took, predicted = (sum(both[i] for both in each.values()) for i in range(2))
        cells = [f"{1e3 * each[name][0]:.1f} {1e3 * each[name][1]:.1f}" if name in each else "" for name in names]
        table.add_row(where, *cells, f"{predicted / took - 1:+.0%}")
        if abs(predicted / took - 1) > MOST_OFF:
            missed.append(f"prices {where} are off by {predicted / took - 1:+.0%}, more than {MOST_OFF:.0%}")
    console().print(table)
    return missed


def _alone(config: Any) -> None:
    """Prints what each collective takes alone, in every level, both ways."""
    from narrows.calibrate.probe import Probe  # noqa: PLC0415
    from narrows.calibrate.rates import Calibrator  # noqa: PLC0415
    from narrows.engine.config import resolve  # noqa: PLC0415

    resolved = resolve(replace(config, layout="all-reduce"))
    table = Table(title="collectives of 4 MiB alone, ms", title_justify="left", box=None)
    ways = (
        (LEVELS[0], (1, 2), False),
        (LEVELS[1], (0, 1), False),
        (LEVELS[2], (0, 2), False),
        (LEVELS[2], (0, 2), True),
    )
    for column in ("collective", *(f"{where}{', hierarchical' * levels}" for where, _, levels in ways)):
        table.add_column(column, justify="left" if column == "collective" else "right")
    with Calibrator(resolved) as alone:
        for op in ("all_reduce", "reduce_scatter", "all_gather", "column_gather"):
            cells = []
            for _, axes, levels in ways:
                each = [alone.ask(Probe.exchange, op, axes, 1 << 22, resolved.dtype, 4, levels) for _ in range(5)]
                cells.append(f"{1e3 * median(each):.2f}")
            table.add_row(op, *cells)
    console().print(table)


# --- tokens


def _tokens(args: argparse.Namespace, rig: HostRig) -> list[str]:
    command = narrows("generate", args.model, *PROMPTS, "--dtype", "float32", "--ignore-eos")
    alone = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    both = on_both(rig, [*command, *MESH, "--checked"], stdout=subprocess.PIPE)
    said = both[0].communicate()[0]
    ended(both)
    print(f"tokens of {len(alone.split())} words: {'equal' if said == alone else 'different'}")
    return [] if said == alone and alone.split() else [f"one rank says {alone!r}, two hosts say {said!r}"]


def _serve(args: argparse.Namespace, rig: HostRig) -> list[str]:
    text, number = PROMPTS[1], PROMPTS[-1]
    command = narrows("generate", args.model, "--prompt", text, "--max-tokens", number, "--dtype", "float32", "--quiet")
    alone = subprocess.run([*command, "--ignore-eos", "--temperature", "0"], capture_output=True, text=True, check=True)
    served = narrows("serve", args.model, *MESH, "--dtype", "float32", "--port", "8123")
    both = on_both(rig, served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    body = {"model": args.model, "prompt": text, "max_tokens": int(number), "temperature": 0, "ignore_eos": True}
    answer = subprocess.run(
        [*rig.on(0), sys.executable, "-c", _ASK, json.dumps(body)], capture_output=True, text=True, check=False
    )
    both[0].terminate()
    codes = [process.wait() for process in both]
    equal = answer.stdout.strip() == alone.stdout.strip().removeprefix(text).strip()
    print(
        f"served: {answer.stdout.strip()!r}, {'as' if equal else 'not as'} one rank; ended with {codes} {answer.stderr}"
    )
    return [] if equal and answer.stdout.strip() else [f"one rank says {alone.stdout!r}"]


_ASK = """
import json, sys, time, urllib.request
url = "http://127.0.0.1:8123/v1/completions"
ask = urllib.request.Request(url, sys.argv[1].encode(), {"Content-Type": "application/json"})
for _ in range(600):
    try:
        print(json.load(urllib.request.urlopen(ask))["choices"][0]["text"])
        break
    except OSError:
        time.sleep(0.2)
"""


# --- faults


def _cut(args: argparse.Namespace, rig: HostRig) -> list[str]:
    """What a host that vanishes looks like to the other, too."""
    more = ("--prompt", "Once upon a time", "--max-tokens", "4000")
    both = _generating(args, rig, *more)
    assert both[0].stdout is not None
    both[0].stdout.read(40)
    rig.cut()
    return _named(both, "cut cable", "nothing was heard for 6 s", most_s=8.0)


def _slow(args: argparse.Namespace, rig: HostRig) -> list[str]:
    """A prefill step whose rows take far longer than --rank-timeout; the time is that from the start."""
    both = _generating(args, rig, "--prompt", "the sea was calm " * 200, "--rank-timeout", "3")
    return _named(both, "cable of 0.5 Mb/s", "which was not done within 3 s", most_s=600.0)


def _generating(args: argparse.Namespace, rig: HostRig, *more: str) -> list[subprocess.Popen[str]]:
    command = narrows("generate", args.model, *MESH, "--ignore-eos", "--quiet", *more)
    return on_both(rig, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _named(both: list[subprocess.Popen[str]], what: str, text: str, *, most_s: float) -> list[str]:
    start = time.monotonic()
    said = []
    for process in both:  # the time is that until the line is there: the process then ends its ranks
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.startswith("narrows: ")), "nothing").strip()
        said.append((time.monotonic() - start, line))
    for process in both:
        process.communicate()
    (took, error), (later, other) = said
    print(f"{what}: after {took:.1f} s: {error}\n  node 1, after {later:.1f} s: {other}")
    return [] if text in error and took < most_s else [f"no {text!r} within {most_s:g} s"]


def console() -> Console:
    return Console(width=120)


if __name__ == "__main__":
    sys.exit(main())
