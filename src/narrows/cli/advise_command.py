"""``narrows advise``: the best deployment that SGLang, vLLM or TensorRT-LLM can run, as its command line. No torch."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from narrows.advise.command import ServerLimits, command_lines, num_hosts, weights_flags
from narrows.advise.flags import FLAG_LISTS, flag_list
from narrows.advise.measured import Comparison, Measured, compare, read_measured
from narrows.advise.missing import StepCosting, missing
from narrows.advise.search import Advice, Setting, Trial, TrialSpec, advise
from narrows.advise.served import served_bands
from narrows.advise.ways import ways
from narrows.arch.presets import load_model_config
from narrows.cli.advise_tables import print_advice, print_comparison
from narrows.cli.console import console
from narrows.cli.loads import LOAD, add_load_flags, at_least, check_load, load_words, more_than_0, plain, workload
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.cli.priced import add_requests_flag, add_revision_flag
from narrows.cost.devices import Device
from narrows.cost.engines import engine_style
from narrows.cost.environment import this_machine
from narrows.cost.imbalance import DEFAULT_SKEW
from narrows.cost.network import NETWORKS, network
from narrows.cost.profile import choose_device
from narrows.errors import ConfigError
from narrows.layout import Topology
from narrows.plan.deploy import longest_context, planned_dtype
from narrows.plan.planner import KV_DTYPES
from narrows.sim.search import Target

__all__ = ["add_parser", "run"]

_ROWS = 8192
"""Rows of a step, as SGLang, vLLM and TensorRT-LLM have it on H100 and H200 by default."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows advise``."""
    parser.add_argument(
        "model", metavar="MODEL", help="a preset such as deepseek-v3, a checkpoint folder, or org/name of the hub"
    )
    served = parser.add_argument_group("deployment")
    add = served.add_argument
    add("--engine", required=True, choices=FLAG_LISTS, help="the engine to write a command line for")
    add("--device", required=True, metavar="NAME", help="device of one rank: h20, h100, h200, b200 ...")
    add("--nodes", default="", metavar="NxR", help="N hosts of R GPUs, such as 2x8 (docs/topology.md)")
    add("--num-gpus", type=int, metavar="N", help="number of GPUs of one host (default 8)")
    add("--network", choices=tuple(NETWORKS), default="", help="what connects hosts (default: the device's usual one)")
    add("--dtype", choices=("bf16", "fp8"), help="dtype of linear weights (default: the checkpoint's)")
    add("--kv-dtype", choices=KV_DTYPES, default="bf16", help="of the KV cache (default %(default)s)")
    add("--expert-skew", type=float, default=DEFAULT_SKEW, metavar="A", help="as in narrows plan (default %(default)s)")
    add(
        "--max-rows",
        type=int,
        default=_ROWS,
        metavar="N",
        help="rows per step as the engine counts them: of each attention group; SGLang: of all (default %(default)s)",
    )
    add_requests_flag(served)
    add("--max-context", type=int, metavar="N", help="tokens per sequence (default: the model's, at most 8192)")
    add("--no-prefix-cache", dest="prefix_cache", action="store_false", help="compute the whole of every prompt")
    add_revision_flag(served)
    add_load_flags(parser.add_argument_group("load"))
    target = parser.add_argument_group("target")
    target.add_argument("--max-ttft", type=float, metavar="MS", help="milliseconds to the first token")
    target.add_argument("--max-tpot", type=float, metavar="MS", help="milliseconds per output token")
    target.add_argument(
        "--percentile", type=float, default=99.0, metavar="P", help="percentage of requests that must meet the target"
    )
    out = add_output_flags(parser)
    out.add_argument(
        "--measured",
        default="",
        metavar="FILE",
        help="compare with the result that the engine's own benchmark wrote (docs/advise.md)",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``narrows advise``; returns 1 if nothing that the engine can do meets the target.

    Raises:
        ConfigError: anything that cannot be, with the numbers; an engine that cannot run the model.
    """
    _check(args)
    measured = read_measured(Path(args.measured)) if args.measured else None
    if measured is not None:
        _take_load(args, measured)
    config = load_model_config(args.model, args.revision)
    nodes = _nodes(args)
    hosts = num_hosts(args.device, nodes)
    found = ways(args.engine, config, nodes.size, hosts)
    hardware = _device(args, nodes.size)
    dtype = args.dtype or planned_dtype(config, hardware, args.model)[0]
    weights = weights_flags(args.engine, config, dtype)
    limits = ServerLimits(
        engine=args.engine,
        rows=args.max_rows,
        requests_per_group=args.requests_per_group,
        max_context=longest_context(config, args.max_context),
        kv_dtype=args.kv_dtype,
        prefix_cache=args.prefix_cache,
    )
    asks = workload(args, limits.max_context)
    setting = Setting(
        config=config,
        device=hardware,
        dtype=dtype,
        engine=engine_style(args.engine),
        limits=limits,
        asks=asks,
        target=Target(
            ttft_s=None if args.max_ttft is None else args.max_ttft / 1e3,
            tpot_s=None if args.max_tpot is None else args.max_tpot / 1e3,
            quantile=args.percentile,
        ),
        concurrency=args.concurrency,
        sampled=args.temperature > 0,
        expert_skew=args.expert_skew,
        nodes=None if nodes.is_one_node else nodes,
        between=network(args.network) if args.network else None,
    )
    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        advice = advise(setting, found, nodes.size, each=_tracked(bar))
    best = advice.best
    if best is None:
        refusals = [trial.candidate.refusal for trial in advice.trials]
        first = min((each for each in refusals if each.startswith("does not fit")), key=len, default=refusals[0])
        title = flag_list(args.engine).title
        raise ConfigError(f"none of the {len(refusals)} ways of {title} to run {config.name} can be had here: {first}")
    assert best.way is not None
    lines = command_lines(args.model, best.way, limits, weights=weights, revision=args.revision, hosts=hosts)
    costing = missing(setting, best, advice.own)
    compared = None if measured is None else compare(measured, best, args.engine)
    if not args.json:
        title = f"{config.name} on {_where(nodes)} x {hardware.title}, {dtype}: {load_words(args, len(asks))}"
        print_advice(args.engine, title, lines, advice, costing, setting, console())
        if compared is not None:
            print_comparison(compared, console())
    put_document(args, _document(args, setting, lines, advice, costing, compared))
    assert best.candidate.outcome is not None
    return 1 if setting.target.misses(best.candidate.outcome) else 0


def _take_load(args: argparse.Namespace, measured: Measured) -> None:
    """Simulate the load that was measured, where the flags say nothing of a load."""
    if args.trace or args.num_requests or args.concurrency or args.rate != math.inf:
        return
    args.num_requests, args.concurrency, args.rate = measured.requests, measured.concurrency, measured.rate
    args.input_length, args.output_length = round(measured.input_tokens), round(measured.output_tokens)
    print(
        f"narrows: the load is that of {measured.file}: {measured.requests} requests of {args.input_length} in / "
        f"{args.output_length} out on average; its lengths may vary (--spread)",
        file=sys.stderr,
    )


def _tracked(bar: Progress) -> Callable[[Sequence[TrialSpec]], Iterable[TrialSpec]]:
    return lambda specs: bar.track(specs, description="simulations")


def _check(args: argparse.Namespace) -> None:
    check_output(args)
    check_load(args)
    for name in ("max_rows", "requests_per_group", "num_gpus"):
        at_least(args, name, 1)
    for name in ("max_ttft", "max_tpot"):
        more_than_0(args, name)
    if not 0 < args.percentile <= 100:
        raise ConfigError(f"--percentile is {args.percentile:g}; it must be more than 0 and at most 100")
    if args.model.endswith(".gguf"):
        raise ConfigError(f"{args.model}: engines are advised on for safetensors checkpoints, not GGUF files")


def _nodes(args: argparse.Namespace) -> Topology:
    """Where the GPUs are: on one host, or as ``--nodes`` says."""
    if not args.nodes:
        if args.network:
            raise ConfigError(f"--network {args.network} connects hosts: say --nodes NxR too, or leave it out")
        return Topology.one_node(8 if args.num_gpus is None else args.num_gpus)
    nodes = Topology.parse(args.nodes)
    if args.num_gpus not in (None, nodes.size):
        raise ConfigError(f"--nodes {nodes} holds {nodes.size} GPUs: leave --num-gpus {args.num_gpus} out")
    if args.network and nodes.is_one_node:
        raise ConfigError(f"--network {args.network} connects hosts, and --nodes {nodes} is one; leave it out")
    return nodes


def _where(nodes: Topology) -> str:
    return str(nodes.size) if nodes.is_one_node else f"{nodes.num_nodes} hosts of {nodes.ranks_per_node}"


def _device(args: argparse.Namespace, num_ranks: int) -> Device:
    setting = partial(this_machine, ranks=num_ranks, threads=1, world="")
    hardware, notes = choose_device(args.device, setting, dtype=args.dtype or "", model=args.model, runs=False)
    for line in notes:
        print(f"narrows: {line}", file=sys.stderr)
    if hardware.is_cpu:
        raise ConfigError(f"--device {args.device}: {flag_list(args.engine).title} is advised on for GPUs; name one")
    return hardware


def _document(
    args: argparse.Namespace,
    setting: Setting,
    lines: Sequence[str],
    advice: Advice,
    costing: Sequence[StepCosting],
    compared: Comparison | None,
) -> dict[str, Any]:
    known = flag_list(args.engine)
    assert advice.best is not None
    return {
        "advise": setting.config.name,
        "engine": {"name": args.engine, "title": known.title, "version": known.version},
        "device": setting.device.name,
        "nodes": str(setting.nodes or Topology.one_node(advice.best.candidate.mesh.size)),
        "dtype": setting.dtype,
        "load": {name: plain(getattr(args, name)) for name in LOAD} | {"requests": len(setting.asks)},
        "target": asdict(setting.target),
        "command": shlex.join(["narrows", *sys.argv[1:]]),
        "command_lines": list(lines),
        "bands": served_bands(args.engine, advice.best),
        "best": _entry(advice.best, setting),
        "own": _entry(advice.own[0], setting),
        "steps": [_step(each) for each in costing],
        "trials": [_entry(trial, setting) for trial in advice.trials],
        "measured": None if compared is None else asdict(compared),
    }


def _entry(trial: Trial, setting: Setting) -> dict[str, Any]:
    candidate, outcome = trial.candidate, trial.candidate.outcome
    what: dict[str, Any] = {
        "way": candidate.layout,
        "mesh": dict(zip(candidate.mesh.names, candidate.mesh.sizes, strict=True)),
        "layouts": dict(trial.layouts),
        "experts": trial.experts,
        "refusal": candidate.refusal,
    }
    if outcome is None:
        return what
    return what | {
        "figures": plain(asdict(outcome.figures)),
        "goodput": setting.target.goodput(outcome) if setting.target.is_set else None,
        "misses": list(setting.target.misses(outcome)),
        "weight_sharding": candidate.sharding,
        "kv_tokens_per_group": candidate.kv_tokens,
        "sources_s": outcome.sources,
        "seconds": outcome.seconds,
    }


def _step(costing: StepCosting) -> dict[str, Any]:
    shape = costing.shape
    return {
        "phase": shape.phase,
        "rows": shape.rows.total,
        "group_rows": list(shape.group_rows),
        "share": costing.share,
        "engine_ms": 1e3 * costing.engine_s,
        "best_ms": 1e3 * costing.best_s,
        "more": costing.more,
        "why": costing.why,
        "missing": [asdict(each) for each in costing.missing],
    }
