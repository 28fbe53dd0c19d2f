"""The kinds of ``narrows bench`` that run an engine: layouts, layers, collectives, throughput and latency.

Tables or JSON go to standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from narrows.bench.collectives import OTHERS, CollectivesWork, collectives
from narrows.bench.engines import Variant, parse_variants
from narrows.bench.grid import Grid
from narrows.bench.latency import LatencyWork, latency
from narrows.bench.layer import layer
from narrows.bench.offline import OfflineWork, offline
from narrows.bench.plot import check_plot, plot
from narrows.bench.results import Outcome
from narrows.calibrate.machine import machine, versions
from narrows.calibrate.step_work import StepWork
from narrows.cli import bench_layout_command
from narrows.cli.arguments import (
    add_engine_flags,
    add_host_flags,
    add_limit_flags,
    add_trace_flags,
    defaults,
    engine_options,
    launch_of,
    limit_options,
    trace_file,
)
from narrows.cli.bench_tables import print_outcome
from narrows.cli.console import console
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.cost.pricer import PHASES
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.errors import ConfigError
from narrows.instruments.trace_file import TraceFile
from narrows.plan.named import applicable_layouts, named_layout
from narrows.ranks.launch import Launch, Series, announce_end
from narrows.ranks.node import run_series

__all__ = ["add_flags", "run"]

_DEFAULT = defaults(EngineConfig)
_SIZES = "2K,32K,2M,16M,64M"
Progress = Callable[[str], None]


def add_flags(parser: argparse.ArgumentParser, kind: str) -> None:
    """The flags of one kind of benchmark."""
    add_engine_flags(parser)
    add_host_flags(parser)
    turns = parser.add_argument_group("turns")
    turns.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default %(default)s)")
    turns.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="untimed rounds before them (default %(default)s)"
    )
    turns.add_argument("--seed", type=int, default=0, help="seed of prompts and dummy weights (default %(default)s)")
    turns.add_argument("--plot", default="", metavar="FILE", help="draw the medians (needs the extra 'plot')")
    _KINDS[kind].add_flags(parser)
    add_output_flags(parser)


def _variant_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("variants (they take turns; ratios are to the first)")
    group.add_argument(
        "--layout", action="append", default=[], metavar="L", help="a layout; repeatable (default: auto)"
    )
    group.add_argument("--every-layout", action="store_true", help="all layouts that apply")
    group.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="K=V[,K=V]",
        help="a variant with these engine options changed; repeatable",
    )
    add_limit_flags(parser)
    add_trace_flags(parser, "what every rank ran when, warm-up rounds included")


def _layer_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--rows", type=int, required=True, metavar="N", help="rows of the step, all groups together")
    work.add_argument("--phase", choices=PHASES, default="prefill", help="phase of the step (default %(default)s)")
    work.add_argument(
        "--context", type=int, default=0, metavar="N", help="tokens per sequence (default: one prompt per group)"
    )
    _variant_flags(parser)


def _collectives_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--sizes", default=_SIZES, metavar="B,B", help="bytes of the whole tensor (default %(default)s)")
    work.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="TRANSPORT",
        help=f"also measure {' or '.join(OTHERS)}; repeatable",
    )


def _offline_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--num-requests", type=int, default=32, metavar="N", help="requests (default %(default)s)")
    work.add_argument(
        "--input-length", type=int, default=512, metavar="N", help="tokens of a prompt (default %(default)s)"
    )
    work.add_argument(
        "--output-length", type=int, default=64, metavar="N", help="tokens of a text (default %(default)s)"
    )
    _variant_flags(parser)


def _latency_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument(
        "--prompt-lengths", default="512,2048", metavar="N,N", help="prompts to time; 0: none (default %(default)s)"
    )
    work.add_argument(
        "--batches", default="1,8,16", metavar="N,N", help="decode batches to time; 0: none (default %(default)s)"
    )
    work.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens when decode begins (default %(default)s)"
    )
    work.add_argument("--steps", type=int, default=32, metavar="N", help="decode steps per round (default %(default)s)")
    _variant_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run a kind of ``narrows bench``."""
    check_output(args)
    for flag, value, least in (("rounds", args.rounds, 1), ("warmup", args.warmup, 0)):
        if value < least:
            raise ConfigError(f"--{flag} is {value}; it must be at least {least}")
    if Launch.of_torchrun(os.environ, world_size=None) is not None:
        raise ConfigError("bench starts its ranks itself, on one host: run it without torchrun")
    if args.plot:
        check_plot(args.plot)
    with ExitStack() as stack:
        args.launch = launch_of(args, {})
        if args.launch is not None:
            args.launch = replace(args.launch, series=Series())
            if not args.launch.is_coordinator:
                return run_series(args.launch)
            stack.callback(announce_end, args.launch)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """In the process that schedules."""
    where = machine()
    notes = console(stderr=True)
    trace = trace_file(args) if "trace" in args else None
    resolved, outcome = _KINDS[args.bench].measure(args, lambda line: notes.print(f"... {line}", markup=False), trace)
    outcome = replace(outcome, notes=(*outcome.notes, *resolved.notes))
    if trace is not None:
        notes.print(trace.write(), markup=False)
    title = f"{resolved.config.name}, {_dtype(resolved)}, {resolved.mesh}, {args.threads} thread(s) per rank"
    print_outcome(args.bench, title, where, outcome, console(quiet=args.json))
    if args.plot:
        plot(outcome, title, args.plot)
    if isinstance(outcome, Grid):
        bench_layout_command.write_page(args, outcome, title, where)
    document = {
        "bench": args.bench,
        "model": args.model,
        "dtype": _dtype(resolved),
        "mesh": dict(zip(resolved.mesh.names, resolved.mesh.sizes, strict=True)),
        "ranks": resolved.engine_config.ranks,
        "threads": resolved.engine_config.threads,
        "command": shlex.join(["narrows", *sys.argv[1:]]),
        "machine": where,
        "versions": versions(),
    }
    put_document(args, document | outcome.document())
    return 0


def _layer(args: argparse.Namespace, progress: Progress, trace: TraceFile | None) -> tuple[Resolved, Outcome]:
    resolved, variants = _variants(args)
    work = StepWork(rows=args.rows, phase=args.phase, context=args.context, seed=args.seed)
    return resolved, layer(variants, work, rounds=args.rounds, warmup=args.warmup, progress=progress, trace=trace)


def _collectives(args: argparse.Namespace, progress: Progress, trace: TraceFile | None) -> tuple[Resolved, Outcome]:
    engine_config = EngineConfig(model=args.model, **engine_options(args, seed=args.seed))
    resolved = resolve(engine_config)
    work = CollectivesWork(sizes=tuple(_bytes(text) for text in args.sizes.split(",")), dtype=resolved.dtype)
    return resolved, collectives(
        engine_config, work, args.against, rounds=args.rounds, warmup=args.warmup, progress=progress
    )


def _offline(args: argparse.Namespace, progress: Progress, trace: TraceFile | None) -> tuple[Resolved, Outcome]:
    for flag in ("num_requests", "input_length", "output_length"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")
    resolved, variants = _variants(args)
    work = OfflineWork(
        num_requests=args.num_requests, input_length=args.input_length, output_length=args.output_length, seed=args.seed
    )
    return resolved, offline(variants, work, rounds=args.rounds, warmup=args.warmup, progress=progress, trace=trace)


def _latency(args: argparse.Namespace, progress: Progress, trace: TraceFile | None) -> tuple[Resolved, Outcome]:
    lengths, batches = _counts(args, "prompt_lengths"), _counts(args, "batches")
    if not lengths and not batches:
        raise ConfigError("--prompt-lengths 0 and --batches 0 leave nothing to measure")
    if args.context < 1 or args.steps < 2:
        raise ConfigError(f"--context {args.context} must be at least 1, and --steps {args.steps} at least 2")
    resolved, variants = _variants(args)
    work = LatencyWork(prompt_lengths=lengths, batches=batches, context=args.context, steps=args.steps, seed=args.seed)
    return resolved, latency(variants, work, rounds=args.rounds, warmup=args.warmup, progress=progress, trace=trace)


def _variants(args: argparse.Namespace) -> tuple[Resolved, tuple[Variant, ...]]:
    engine_config = EngineConfig(model=args.model, **engine_options(args, seed=args.seed, **limit_options(args)))
    resolved = resolve(engine_config)
    config, mesh = resolved.config, resolved.mesh
    if engine_config.plan_file and (args.layout or args.every_layout):
        raise ConfigError("--plan runs its own layout at every step: leave --layout and --every-layout out")
    if args.layout and args.every_layout:
        raise ConfigError("--every-layout runs all layouts: leave --layout out")
    for name in args.layout:
        named_layout(name, config, mesh)  # one that cannot apply is known before anything runs
    layouts = applicable_layouts(config, mesh) if args.every_layout else tuple(args.layout)
    variants = parse_variants(engine_config, layouts, args.against)
    for variant in variants:
        resolve(variant.config)
    return resolved, variants


def _counts(args: argparse.Namespace, flag: str) -> tuple[int, ...]:
    text = getattr(args, flag)
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (-1,)
    if min(counts) < 0:
        raise ConfigError(f"--{flag.replace('_', '-')} {text!r}: whole numbers with commas between are needed")
    return tuple(dict.fromkeys(count for count in counts if count))


def _bytes(text: str) -> int:
    """
    >>> _bytes("2K"), _bytes("16M")
    (2048, 16777216)
    """
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or not int(digits):
        raise ConfigError(f"--sizes: {text!r} is no number of bytes; for example {_SIZES}")
    return int(digits) * unit


def _dtype(resolved: Resolved) -> str:
    return str(resolved.dtype).removeprefix("torch.")


class _Kind(NamedTuple):
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Progress, TraceFile | None], tuple[Resolved, Outcome]]


_KINDS = {
    "layout": _Kind(bench_layout_command.add_flags, bench_layout_command.measure),
    "layer": _Kind(_layer_flags, _layer),
    "collectives": _Kind(_collectives_flags, _collectives),
    "offline": _Kind(_offline_flags, _offline),
    "latency": _Kind(_latency_flags, _latency),
}
