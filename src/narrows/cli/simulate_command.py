"""``narrows simulate``: runs a load on the real scheduler in predicted time. Needs no checkpoint, GPU or torch."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from narrows.arch.config import ModelConfig
from narrows.arch.presets import load_model_config
from narrows.arch.weight_sharding import sharding_words
from narrows.cli.console import console
from narrows.cli.loads import (
    FLOOD,
    LOAD,
    add_flood_flags,
    add_load_flags,
    at_least,
    check_flood,
    check_load,
    load_words,
    more_than_0,
    plain,
    save_answers,
    with_flood,
    workload,
)
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.cli.priced import add_priced_flags, add_prompt_rows_flag, add_requests_flag
from narrows.cli.simulate_tables import print_candidate, print_ranking, print_unfit
from narrows.cost.devices import Device
from narrows.cost.engines import engine_style
from narrows.cost.environment import this_machine
from narrows.cost.network import network
from narrows.cost.profile import choose_device
from narrows.errors import ConfigError
from narrows.layout import Mesh, Topology
from narrows.plan.deploy import DEFAULT_ROWS, longest_context, planned_dtype
from narrows.plan.named import applicable_layouts, inapplicable, named_layout
from narrows.plan.planner import Deployment
from narrows.plan.report.evidence import nodes_line, ranks_line
from narrows.sim.costs import StepCosts
from narrows.sim.engine import simulate
from narrows.sim.intake import Intake
from narrows.sim.measured import read_step_times
from narrows.sim.search import Candidate, Target, meshes, ranked
from narrows.sim.serving import DoesNotFit, serving
from narrows.workload.arrivals import Ask

__all__ = ["add_parser", "run"]

_SATURATED = 0.85
"""From this utilisation on, requests spend most of their time waiting."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows simulate``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a preset such as deepseek-v3, a checkpoint folder, a .gguf file, or org/name of the hub",
    )
    served = parser.add_argument_group("deployment")
    add = served.add_argument
    add(
        "--device",
        required=True,
        metavar="NAME",
        help="device of one rank: h20, h100, h200, b200, a100, cpu-core ..., a profile's file, or auto: "
        "this machine's profile",
    )
    add_priced_flags(served, no_layout="auto")
    add("--max-rows", type=int, default=DEFAULT_ROWS, metavar="N", help="rows per step (default %(default)s)")
    add_requests_flag(served)
    add_prompt_rows_flag(served)
    add(
        "--recv-interval",
        type=int,
        default=1,
        metavar="STEPS",
        help="look for new requests once in so many decode steps, as SGLang's --scheduler-recv-interval (default 1)",
    )
    add(
        "--batch-wait",
        default="",
        metavar="STEPS:SHARE",
        help="prompts wait so many decode steps, or until rows fill this share of --max-rows, as TensorRT-LLM's "
        "batch_wait_timeout_iters and batch_wait_max_tokens_ratio (default: not at all)",
    )
    add("--max-context", type=int, metavar="N", help="tokens per sequence (default: the model's, at most 8192)")
    add("--kv-tokens", type=int, metavar="N", help="KV cache per attention group (default: what the memory leaves)")
    add("--no-prefix-cache", dest="prefix_cache", action="store_false", help="compute the whole of every prompt")
    add(
        "--step-overhead",
        type=float,
        default=0.0,
        metavar="US",
        help="microseconds that every step takes beside its plan (default 0)",
    )
    add(
        "--step-times", default="", metavar="FILE", help="use measured step times in place of prices (docs/simulate.md)"
    )
    load = parser.add_argument_group("load")
    add_load_flags(load)
    add_flood_flags(load)
    target = parser.add_argument_group("target and search")
    target.add_argument("--max-ttft", type=float, metavar="MS", help="target: milliseconds to the first token")
    target.add_argument("--max-tpot", type=float, metavar="MS", help="target: milliseconds per output token")
    target.add_argument(
        "--percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="percentage of requests that must meet the target (default 99)",
    )
    target.add_argument("--search", action="store_true", help="rank every dp x tp x layout of --num-gpus devices")
    target.add_argument(
        "--num-gpus",
        default="",
        metavar="N[,N...]",
        help="numbers of devices to search (default: those of --nodes, or dp x tp)",
    )
    out = add_output_flags(parser)
    out.add_argument(
        "--save-requests", default="", metavar="FILE", help="write one line of JSON per request, of the best candidate"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``narrows simulate``; returns 1 if a request can never run, or if no candidate of a search meets the target.

    Raises:
        ConfigError: an impossible option, with the numbers; a deployment that does not fit, if it is the only one.
    """
    _check(args)
    config = load_model_config(args.model, args.revision)
    deployments = _deployments(args, config)
    most = max((mesh.size for mesh, _ in deployments), default=1)
    hosts = Topology.parse(args.nodes).num_nodes if args.nodes else 1
    setting = partial(this_machine, ranks=most, threads=1, world="", hosts=hosts)
    hardware, price_notes = choose_device(args.device, setting, dtype=args.dtype or "", model=args.model, runs=False)
    for line in price_notes:
        print(f"narrows: {line}", file=sys.stderr)
    max_context = longest_context(config, args.max_context)
    asks = with_flood(args, workload(args, max_context), max_context)
    target = Target(
        ttft_s=None if args.max_ttft is None else args.max_ttft / 1e3,
        tpot_s=None if args.max_tpot is None else args.max_tpot / 1e3,
        quantile=args.percentile,
    )
    dtype, because = _dtype(args, config, hardware)
    quiet = len(deployments) == 1 or not sys.stderr.isatty()
    with Progress(console=console(stderr=True), transient=True, disable=quiet) as bar:
        candidates = [
            _candidate(args, config, hardware, dtype, mesh, layout, asks, max_context)
            for mesh, layout in bar.track(deployments, description="simulations")
        ]
    if all(candidate.outcome is None for candidate in candidates):
        raise ConfigError("; ".join(dict.fromkeys(candidate.refusal for candidate in candidates)))
    best_first = ranked(candidates, target)
    best = best_first[0]
    assert best.outcome is not None
    used: float | None = None
    if len(candidates) == 1 and not args.concurrency and (math.isfinite(args.rate) or args.trace):
        crowd = [replace(ask, at_s=0.0) for ask in asks]
        at_once = _candidate(args, config, hardware, dtype, best.mesh, best.layout, crowd, max_context)
        used = _utilisation(asks, at_once)
    if not args.json:
        out = console()
        title = f"{config.name} on {hardware.title}, {best.dtype}: {load_words(args, len(asks))}"
        print_unfit(candidates, out)
        for candidate in (best,) if args.search else candidates:
            print_candidate(candidate, title, target, out)
            dtype_line = f"dtype {dtype}: {because}" if because else ""
            notes = (dtype_line, engine_style(args.engine).note, *candidate.notes)
            for line in filter(None, (*notes, _saturation(used))):
                out.print(f"note: {line}", markup=False, highlight=False)
        if target.is_set and len(candidates) > 1 and target.misses(best.outcome):
            out.print(f"none of these {len(candidates)} meets the target; the nearest comes first", markup=False)
        if len(candidates) > 1:
            print_ranking(best_first, target, out)
    if args.save_requests:
        save_answers(best.outcome.answers, args.save_requests)
    put_document(
        args, _document(args, config, hardware, best_first if args.search else candidates, target, len(asks), used)
    )
    if target.is_set and args.search:
        return 1 if target.misses(best.outcome) else 0
    return (
        1 if any(candidate.outcome is not None and candidate.outcome.figures.failed for candidate in candidates) else 0
    )


def _check(args: argparse.Namespace) -> None:
    check_output(args)
    check_load(args)
    check_flood(args)
    at_least(args, "max_rows", 1)
    at_least(args, "prompt_rows", 0)
    at_least(args, "recv_interval", 1)
    _intake(args, 0.0)
    for name in ("max_ttft", "max_tpot"):
        more_than_0(args, name)
    if args.network and not args.nodes:
        raise ConfigError(f"--network {args.network} connects nodes: say --nodes NxR too, or leave it out")
    if not 0 < args.percentile <= 100:
        raise ConfigError(f"--percentile is {args.percentile:g}; it must be more than 0 and at most 100")
    if not 0 <= args.step_overhead < 1e9:
        raise ConfigError(f"--step-overhead is {args.step_overhead:g}; it must be at least 0 microseconds")
    if args.step_times and (args.search or len(args.layout) > 1):
        raise ConfigError("--step-times are of one mesh and layout: leave out --search, and all but one --layout")
    if args.num_gpus and not args.search:
        raise ConfigError("--num-gpus needs --search; or give --dp and --tp instead")
    if args.num_gpus and (args.dp, args.tp) != (1, 1):
        raise ConfigError("--search finds dp and tp for --num-gpus: leave --dp and --tp out")


def _intake(args: argparse.Namespace, arrival_s: float) -> Intake:
    """When new requests come to the scheduler.

    Raises:
        ConfigError: ``--batch-wait`` is not a number of steps and a share.
    """
    found = re.fullmatch(r"(\d{1,6}):(0|1|0?\.\d+|1\.0*)", args.batch_wait) if args.batch_wait else None
    if args.batch_wait and found is None:
        raise ConfigError(f"--batch-wait {args.batch_wait}: steps and a share of --max-rows are needed, as in 20:0.9")
    steps, share = (int(found[1]), float(found[2])) if found else (0, 0.0)
    rows = math.ceil(share * args.max_rows)
    return Intake(arrival_s=arrival_s, recv_interval=args.recv_interval, wait_steps=steps, wait_rows=rows)


def _deployments(args: argparse.Namespace, config: ModelConfig) -> Sequence[tuple[Mesh, str]]:
    """The meshes and layouts to simulate: those that were named, or all that are to be searched."""
    layouts = tuple(dict.fromkeys(args.layout))
    if not args.search:
        mesh = Mesh.of(dp=args.dp, tp=args.tp)
        for layout in layouts:
            named_layout(layout, config, mesh)
        return [(mesh, layout) for layout in layouts or ("auto",)]
    try:
        nodes = Topology.parse(args.nodes).size if args.nodes and (args.dp, args.tp) == (1, 1) else args.dp * args.tp
        counts = [int(part) for part in args.num_gpus.split(",")] if args.num_gpus else [nodes]
    except ValueError:
        raise ConfigError(f"--num-gpus {args.num_gpus!r}: whole numbers with commas between are needed") from None
    return [
        (mesh, layout)
        for count in dict.fromkeys(counts)
        for mesh in meshes(config, count)
        for layout in layouts or applicable_layouts(config, mesh)
    ]


def _utilisation(asks: Sequence[Ask], at_once: Candidate) -> float | None:
    """Requests that arrive per second, over those answered per second if all arrive at once; None if unknown."""
    last = max(ask.at_s for ask in asks)
    most = at_once.outcome.figures.request_throughput if at_once.outcome is not None else 0.0
    return len(asks) / last / most if most and last else None


def _saturation(used: float | None) -> str:
    """How near the load is to the ranks' capacity, and the effect on the figures."""
    if used is None:
        return ""
    line = f"utilisation: requests come at {used:.0%} of the rate at which they are answered when all come at once"
    if used < _SATURATED:
        return line
    return (
        f"{line}: near saturation, where waiting grows faster than load, so that TTFT and E2E are far less certain "
        "than prices are"
    )


def _dtype(args: argparse.Namespace, config: ModelConfig, hardware: Device) -> tuple[str, str]:
    """The requested dtype, or the one of the checkpoint's weights on this device and why."""
    return (args.dtype, "") if args.dtype else planned_dtype(config, hardware, args.model)


def _candidate(
    args: argparse.Namespace,
    config: ModelConfig,
    hardware: Device,
    dtype: str,
    mesh: Mesh,
    layout: str,
    asks: Sequence[Ask],
    max_context: int,
) -> Candidate:
    """Simulate one mesh and layout, or say why that is not possible."""
    if reason := inapplicable(layout, config, mesh):
        return Candidate(mesh=mesh, layout=layout, dtype=dtype, refusal=f"cannot apply: {reason}")
    nodes = None
    if args.nodes:
        nodes = Topology.parse(args.nodes)
        nodes = nodes.holding(mesh.size) if args.search else nodes
    deployment = Deployment(
        config=config,
        mesh=mesh,
        device=hardware,
        dtype=dtype,
        graph=not args.eager and not hardware.shared_memory,  # there steps are launched one by one, always
        encode_rows=args.encode_rows,
        expert_skew=args.expert_skew,
        kv_dtype=args.kv_dtype,
        engine=engine_style(args.engine),
        experts=args.experts,
        nodes=nodes,
        between=network(args.network) if args.network and nodes is not None and not nodes.is_one_node else None,
    )
    try:
        found = serving(
            deployment,
            layout,
            rows_per_step=args.max_rows,
            max_context=max_context,
            kv_tokens=args.kv_tokens,
            requests_per_group=args.requests_per_group,
            prompt_rows=args.prompt_rows,
            prefix_cache=args.prefix_cache,
        )
    except DoesNotFit as error:
        return Candidate(mesh=mesh, layout=layout, dtype=dtype, refusal=str(error))
    if args.step_times:
        costs: StepCosts = read_step_times(Path(args.step_times))
    else:
        costs = found.costs(sampled=args.temperature > 0, overhead_s=args.step_overhead * 1e-6)
    return Candidate(
        mesh=mesh,
        layout=layout,
        dtype=dtype,
        sharding=sharding_words(config, found.sharding),
        kv_tokens=found.limits.tokens_per_group,
        memory=found.memory,
        notes=(nodes_line(deployment), ranks_line(hardware, mesh.size)),
        outcome=simulate(
            found.limits,
            costs,
            asks,
            concurrency=args.concurrency,
            fair=args.fair_shares,
            intake=_intake(args, deployment.engine.arrival_s),
        ),
    )


def _document(
    args: argparse.Namespace,
    config: ModelConfig,
    hardware: Device,
    candidates: Sequence[Candidate],
    target: Target,
    count: int,
    used: float | None,
) -> dict[str, Any]:
    return {
        "simulate": config.name,
        "device": args.device,
        "nodes": args.nodes,
        "network": (args.network or hardware.network) if args.nodes else "",
        "intake": {"recv_interval": args.recv_interval, "batch_wait": args.batch_wait},
        "load": {name: plain(getattr(args, name)) for name in (*LOAD, *FLOOD)} | {"requests": count},
        "target": asdict(target),
        "command": shlex.join(["narrows", *sys.argv[1:]]),
        "candidates": [_entry(candidate, target) for candidate in candidates],
        "utilisation": used,
    }


def _entry(candidate: Candidate, target: Target) -> dict[str, Any]:
    mesh, outcome = candidate.mesh, candidate.outcome
    what: dict[str, Any] = {
        "mesh": dict(zip(mesh.names, mesh.sizes, strict=True)),
        "layout": candidate.layout,
        "dtype": candidate.dtype,
        "refusal": candidate.refusal,
    }
    if outcome is None:
        return what
    return what | {
        "weight_sharding": candidate.sharding,
        "kv_tokens_per_group": candidate.kv_tokens,
        "figures": plain(asdict(outcome.figures)),
        "goodput": target.goodput(outcome) if target.is_set else None,
        "misses": list(target.misses(outcome)),
        "busy_s": outcome.busy_s,
        "seconds": outcome.seconds,
        "sources_s": outcome.sources,
        "kv_pages_most": outcome.kv_pages_most,
        "scheduler": asdict(outcome.stats),
        "fairness": None if outcome.fairness is None else plain(asdict(outcome.fairness)),
        "plans": [asdict(use) for use in outcome.plans],
    }
