"""``narrows calibrate``: measures this machine's prices and writes them to a profile."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from narrows.calibrate.machine import machine
from narrows.calibrate.measure import Grid, calibrate, figures_of
from narrows.calibrate.price_tables import Calibration
from narrows.cli.arguments import add_host_flags, check_host_flags, nodes_of
from narrows.cli.console import console
from narrows.cli.renamed import add_old_spelling
from narrows.cost.environment import MachineFingerprint, num_cores
from narrows.cost.profile import DeviceFigures, Profile, nearest_device, profiles_folder, write_profile
from narrows.engine.config import QUANTIZATIONS, EngineConfig
from narrows.engine.rank_environment import rank_fingerprint, transport_name
from narrows.errors import ConfigError
from narrows.ranks.affinity import room
from narrows.ranks.launch import Launch, Series, announce_end
from narrows.ranks.node import run_series

__all__ = ["add_parser", "run"]

TRANSPORTS = ("shm", "threads", "gloo", "nccl")
_MODELS = ("dsv3-mini", "dsv2-mini")
_MOST_RANKS_PER_CORE = 8
_QUICK = Grid(
    rows=(1, 8, 64, 512),
    prompt_rows=(),
    decode_rows=(1, 8, 64),
    long_rows=(8,),
    nbytes=(1 << 9, 1 << 13, 1 << 17, 1 << 21),
    most_rounds=2,
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows calibrate``."""
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"presets or folders whose stages are measured, with random weights (default: {' '.join(_MODELS)})",
    )
    add("--num-ranks", type=int, metavar="N", help="ranks in all, dp x tp (default: one per core or GPU)")
    add_old_spelling(parser, "--ranks", "--num-ranks", type=int)
    add("--threads", type=int, default=1, help="threads per rank (default %(default)s)")
    add(
        "--transport",
        choices=TRANSPORTS,
        default="shm",
        help="how ranks exchange: processes of one host through shared memory (shm), threads of one process, processes "
        "through gloo, or GPUs through nccl (default %(default)s)",
    )
    add_old_spelling(parser, "--world", "--transport", choices=TRANSPORTS)
    add("--dtype", default="bfloat16", help="bfloat16 or float32, of activations and weights (default %(default)s)")
    add("--quantization", choices=QUANTIZATIONS, default="none", help="int8 linear and expert weights (default none)")
    add(
        "--seconds",
        type=float,
        default=170.0,
        metavar="S",
        help="time limit; the most expensive points are left out (default %(default)g)",
    )
    add("--quick", action="store_true", help="measure few points: faster, with rougher prices")
    add(
        "--out",
        metavar="FILE",
        help="write the profile to FILE (default: among this user's profiles, see docs/profiles.md)",
    )
    add_host_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``narrows calibrate``."""
    config = _engine_config(args)
    num_ranks = _num_ranks(args, config.run_on)
    launch = _launch(args, num_ranks)
    hosts = 1 if launch is None else launch.num_nodes
    fingerprint = rank_fingerprint(
        run_on=config.run_on, ranks=config.ranks, hosts=hosts, num_ranks=num_ranks, threads=args.threads
    )
    transport = transport_name(run_on=config.run_on, ranks=config.ranks, hosts=hosts)
    if transport not in (args.transport, f"{args.transport}+gloo"):
        way_out = (
            "processes of one host share memory; run it, and the engine, with NARROWS_SHM=0"
            if args.transport == "gloo"
            else f"NARROWS_SHM=0 or no compiled code (docs/kernels.md); mend that, or calibrate --transport {transport}"
        )
        raise ConfigError(
            f"--transport {args.transport} is not available here: ranks exchange through {transport}: {way_out}"
        )
    if launch is not None and not launch.is_coordinator:
        return run_series(launch)
    config = replace(config, launch=launch)
    where = machine()
    models = tuple(args.models) or _MODELS
    out = console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
    with bar, contextlib.ExitStack() as stack:
        if launch is not None:
            stack.callback(announce_end, launch)
        task = bar.add_task("starting ranks", total=1.0)
        found = calibrate(
            models,
            config,
            num_ranks=num_ranks,
            grid=_QUICK if args.quick else Grid(),
            seconds=args.seconds,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    profile = _profile(args, fingerprint, found, models, where["memory_gib"] * (1 << 30), where["date"])
    path = Path(args.out) if args.out else profiles_folder() / f"{profile.name}.json"
    write_profile(path, profile)
    _print(profile, found, path)
    return 0


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    if not args.seconds > 0:
        raise ConfigError(f"--seconds is {args.seconds:g}; it must be more than 0")
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    return EngineConfig(
        model=_MODELS[0],
        layout="all-reduce",
        dtype=args.dtype,
        run_on="cuda" if args.transport == "nccl" else "cpu",
        device="cpu-core" if args.transport != "nccl" else "auto",
        ranks="threads" if args.transport == "threads" else "processes",
        threads=args.threads,
        quantization=args.quantization,
        load_format="dummy",
        kv_tokens=1024,  # the measured tables bring their own
    )


def _launch(args: argparse.Namespace, num_ranks: int) -> Launch | None:
    """This process's part among several hosts.

    Raises:
        ConfigError: a flag is missing, or has a value that it cannot have.
    """
    if args.nnodes is None:
        check_host_flags(args)
        return None
    if args.num_ranks is None:
        raise ConfigError("--nnodes needs --num-ranks: how many on all hosts together")
    if args.transport not in ("shm", "gloo"):
        raise ConfigError(f"ranks on several hosts are processes on CPUs: leave out --transport {args.transport}")
    launch = nodes_of(args, num_ranks)
    if num_ranks % launch.num_nodes:
        raise ConfigError(f"--num-ranks {num_ranks} cannot be dealt evenly to --nnodes {launch.num_nodes}")
    return replace(launch, series=Series())


def _num_ranks(args: argparse.Namespace, run_on: str) -> int:
    if args.num_ranks is None:
        return max(room(run_on) // (int(args.threads) if run_on == "cpu" else 1), 1)
    if args.num_ranks < 1:
        raise ConfigError(f"--num-ranks is {args.num_ranks}; it must be at least 1")
    most = _MOST_RANKS_PER_CORE * num_cores() * (args.nnodes or 1)
    if run_on == "cpu" and args.num_ranks > most:
        raise ConfigError(
            f"--num-ranks {args.num_ranks} on {num_cores()} cores would measure how they wait for a core; "
            f"at most {most} here"
        )
    return int(args.num_ranks)


def _profile(
    args: argparse.Namespace,
    fingerprint: MachineFingerprint,
    found: Calibration,
    models: tuple[str, ...],
    memory: float,
    date: str,
) -> Profile:
    words = [f"{fingerprint.ranks}x{fingerprint.threads}", fingerprint.world.replace("+", "-")]
    words += [f"{fingerprint.hosts}hosts"] if fingerprint.hosts > 1 else []
    words += [args.quantization] if args.quantization != "none" else []
    words += ["fp32"] if args.dtype == "float32" else []
    words += [Path(model).name for model in models if models != _MODELS]
    dtype = "fp32" if args.dtype == "float32" else "bf16"
    figures = figures_of(found, num_ranks=fingerprint.ranks, memory_bytes=memory * fingerprint.hosts, dtype=dtype)
    if fingerprint.card:
        del figures["memory_bytes"]  # the host's, and not its GPUs'
    return Profile(
        name="-".join(words),
        title=f"{fingerprint.ranks} ranks of {fingerprint.cpu}"
        + (f" on {fingerprint.hosts} hosts" if fingerprint.hosts > 1 else ""),
        fits=fingerprint,
        made={
            "date": date or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(["narrows", *sys.argv[1:]]),
            "models": list(models),
            "seconds": round(found.seconds, 1),
            "left_out": list(found.left_out),
        },
        device=DeviceFigures(like=nearest_device(fingerprint) or "h100", **figures),
        stages=list(found.measured.stages),
        collectives=list(found.measured.collectives),
        copies=[list(row) for row in found.measured.copies],
        steps=list(found.measured.steps),
    )


def _print(profile: Profile, found: Calibration, path: Path) -> None:
    out, measured = console(), found.measured
    table = Table(title=f"{profile.title}: {found.seconds:.0f} s", title_justify="left", box=None)
    for column, justify in (("what", "left"), ("tables", "right"), ("points", "right"), ("spread, median", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    spreads = sorted(row[2] for stage in measured.stages for row in stage.points)
    points = len(spreads)
    table.add_row("stages", str(len(measured.stages)), str(points), f"{spreads[points // 2]:.1%}")
    exchanged = sorted(row[2] for each in measured.collectives for row in each.points)
    if exchanged:
        middle = f"{exchanged[len(exchanged) // 2]:.1%}"
        table.add_row("collectives", str(len(measured.collectives)), str(len(exchanged)), middle)
    table.add_row(
        "steps outside the plan", str(len(measured.steps)), str(sum(len(s.points) for s in measured.steps)), ""
    )
    out.print(table)
    out.print(
        f"products {found.flop_per_s / 1e9:.0f} GFLOP/s and reads {found.read_bytes_per_s / 1e9:.1f} GB/s per rank",
        markup=False, highlight=False,
    )  # fmt: skip
    for left_out in found.left_out:
        out.print(f"left out, for lack of time: {left_out}", markup=False, highlight=False)
    out.print(f"profile: {path}", markup=False, highlight=False, soft_wrap=True)
    flag = {"threads": "--ranks threads", "nccl": "--run-on cuda"}.get(profile.fits.world, "--ranks processes")
    flag += f" --nnodes {profile.fits.hosts}" if profile.fits.hosts > 1 else ""
    used = f"used by generate, serve and bench on {profile.fits.ranks} such ranks here ({flag})"
    out.print(f"{used}, and by every command with --device {path}", markup=False, highlight=False, soft_wrap=True)
