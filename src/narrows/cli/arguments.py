"""Flags that several commands share, with the defaults of the engine's config."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from narrows.cli.priced import add_requests_flag, add_revision_flag
from narrows.cli.renamed import add_old_spelling
from narrows.engine.config import LOAD_FORMATS, QUANTIZATIONS, RANKS, RUN_ON, EngineConfig
from narrows.errors import ConfigError
from narrows.instruments.trace_file import TraceFile
from narrows.instruments.tracer import DEFAULT_STEPS
from narrows.plan.planner import ENCODE_ROWS
from narrows.ranks.launch import Launch

__all__ = [
    "add_engine_flags",
    "add_host_flags",
    "add_limit_flags",
    "add_prompt_flags",
    "add_trace_flags",
    "check_host_flags",
    "defaults",
    "engine_options",
    "launch_of",
    "limit_options",
    "nodes_of",
    "read_prompts",
    "trace_file",
]


def defaults(kind: Any) -> dict[str, Any]:
    """The default of every field of a dataclass that has one."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


_DEFAULT = defaults(EngineConfig)


def add_engine_flags(parser: argparse.ArgumentParser, *, ranks: str = _DEFAULT["ranks"], chosen: bool = False) -> None:
    """MODEL, and the flags of the mesh and the engine.

    Args:
        ranks: the default of ``--ranks``.
        chosen: whether ``--tp`` and ``--threads`` default to ``auto``, which fits them to the machine.
    """
    number, default = (_count_or_auto, "auto") if chosen else (int, "1")
    what = ", or auto" if chosen else ""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder (config.json, safetensors, tokenizer.json), a .gguf file, or org/name of the hub",
    )
    add_revision_flag(parser)
    mesh = parser.add_argument_group("mesh of dp x tp ranks")
    mesh.add_argument("--dp", type=int, default=_DEFAULT["dp"], help="attention groups (default %(default)s)")
    mesh.add_argument("--tp", type=number, default=number(default), help=f"ranks per group{what} (default {default})")
    mesh.add_argument(
        "--ranks", choices=RANKS, help=f"run ranks as threads of one process, or as processes (default {ranks})"
    )
    mesh.add_argument(
        "--threads", type=number, default=number(default), help=f"threads per rank{what} (default {default})"
    )
    mesh.add_argument(
        "--rank-timeout",
        type=float,
        default=_DEFAULT["timeout_s"],
        metavar="S",
        help="seconds that a live rank may keep the others waiting (default %(default)g)",
    )
    add_old_spelling(mesh, "--timeout", "--rank-timeout", type=float)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype", default=_DEFAULT["dtype"], help="bfloat16, float32 or auto, the checkpoint's (default %(default)s)"
    )
    engine.add_argument(
        "--run-on", choices=RUN_ON, default=_DEFAULT["run_on"], help="where ranks compute (default %(default)s)"
    )
    engine.add_argument(
        "--device",
        default=_DEFAULT["device"],
        help="device that plans are priced for, by name or a profile's file (default: the one that ranks run on)",
    )
    engine.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default=_DEFAULT["quantization"],
        help="how linear and expert weights are held: rounded to int8 (int8 rounds rows too), or stored: in the "
        "blocks of a GGUF file, which is the default where they are (docs/kernels.md)",
    )
    engine.add_argument(
        "--encode-rows",
        choices=tuple(ENCODE_ROWS),
        default=_DEFAULT["encode_rows"],
        help="encode rows before gathers where that pays, or always (docs/encoded-rows.md; default none)",
    )
    engine.add_argument(
        "--load-format",
        default=_DEFAULT["load_format"],
        help=f"{', '.join(LOAD_FORMATS)}; dummy has random weights (default %(default)s)",
    )
    engine.add_argument(
        "--checked", action="store_true", help="compare collectives and shapes between ranks at every step"
    )


def _count_or_auto(text: str) -> int | None:
    """A number, or None for ``auto``."""
    return None if text == "auto" else int(text)


_count_or_auto.__name__ = "number, or auto"  # argparse's name for it in errors


def engine_options(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The fields of :class:`EngineConfig` that :func:`add_engine_flags` parsed."""
    names = (
        "revision",
        "dp",
        "tp",
        "threads",
        "dtype",
        "run_on",
        "device",
        "quantization",
        "encode_rows",
        "load_format",
        "checked",
    )
    launch = getattr(args, "launch", None)
    several = "processes" if launch is not None else _DEFAULT["ranks"]
    ranks = {"ranks": args.ranks or several, "timeout_s": args.rank_timeout, "launch": launch}
    ranks["fork_self"] = getattr(args, "fork_self", False)  # `main` sets it in its own process
    return {name: getattr(args, name) for name in names} | ranks | more


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Limits of a step and of the KV cache, and ``--plan``."""
    limits = parser.add_argument_group("limits and plans")
    limits.add_argument(
        "--plan", dest="plan_file", default="", metavar="FILE", help="run the plan that narrows plan --save wrote"
    )
    limits.add_argument(
        "--max-rows", type=int, default=_DEFAULT["rows_per_step"], help="rows per step (default %(default)s)"
    )
    add_requests_flag(limits)
    limits.add_argument("--max-context", type=int, help="tokens per sequence (default: the model's, at most 8192)")
    limits.add_argument("--kv-tokens", type=int, help="tokens of KV cache per attention group (default: two contexts)")
    limits.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make a text independent of what else runs (docs/batch-invariance.md)",
    )
    limits.add_argument(
        "--no-prefix-cache", dest="prefix_cache", action="store_false", help="compute the whole of every prompt"
    )


def limit_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`EngineConfig` that :func:`add_limit_flags` parsed."""
    names = ("plan_file", "requests_per_group", "max_context", "kv_tokens", "batch_invariant", "prefix_cache")
    return {name: getattr(args, name) for name in names} | {"rows_per_step": args.max_rows}


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ranks on several hosts."""
    hosts = parser.add_argument_group("several hosts: the same command on each, with its own --node-rank; or torchrun")
    hosts.add_argument("--nnodes", type=int, metavar="N", help="number of hosts; they get the ranks in order")
    hosts.add_argument("--node-rank", type=int, metavar="K", help="number of this host; 0 schedules and prints")
    hosts.add_argument("--master-addr", metavar="A", help="address of host 0 that all hosts can reach")
    hosts.add_argument("--master-port", type=int, metavar="P", help="a free port of host 0")


def launch_of(args: argparse.Namespace, environment: Mapping[str, str]) -> Launch | None:
    """This process's part among several hosts, from :func:`add_host_flags` or from torchrun's environment.

    Raises:
        ConfigError: a flag without ``--nnodes``, or a value that no launch can have.
    """
    dp = max(args.dp, 1)
    if args.nnodes is not None:
        return nodes_of(args, dp * max(args.tp or 1, 1))
    check_host_flags(args)
    return Launch.of_torchrun(environment, world_size=None if args.tp is None else dp * max(args.tp, 1))


def nodes_of(args: argparse.Namespace, world_size: int) -> Launch:
    """This process's part where a person starts one on each host (``--nnodes``).

    Raises:
        ConfigError: a value is missing or out of range.
    """
    return Launch.of_nodes(
        world_size=world_size,
        num_nodes=args.nnodes,
        node=args.node_rank,
        address=args.master_addr,
        port=args.master_port,
    )


def check_host_flags(args: argparse.Namespace) -> None:
    """Refuse the flags of :func:`add_host_flags` without ``--nnodes``.

    Raises:
        ConfigError: one is given.
    """
    given = [flag for flag in ("node_rank", "master_addr", "master_port") if getattr(args, flag) is not None]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} needs --nnodes: how many hosts there are")


def add_prompt_flags(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Prompts, and whether they are chats."""
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=f"a prompt; repeatable{default}")
    prompts.add_argument("--prompt-file", metavar="FILE", help="a text file with one prompt per line")
    prompts.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")


def add_trace_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """``--trace`` and ``--trace-steps``; ``what`` describes the trace."""
    trace = parser.add_argument_group("trace for Perfetto and chrome://tracing (docs/tracing.md)")
    trace.add_argument("--trace", default="", metavar="FILE", help=f"write {what}; compressed if FILE ends in .gz")
    trace.add_argument(
        "--trace-steps",
        type=int,
        default=DEFAULT_STEPS,
        metavar="N",
        help="trace at most N steps (default %(default)s)",
    )


def trace_file(args: argparse.Namespace) -> TraceFile | None:
    """The trace to write; None without ``--trace``.

    Raises:
        ConfigError: its file cannot be written, or ``--trace-steps`` is less than 1.
    """
    return TraceFile(file=args.trace, num_steps=args.trace_steps) if args.trace else None


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of ``--prompt`` and ``--prompt-file``, in this order."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {args.prompt_file} cannot be read: {error}") from None
        prompts += [line for line in lines if line.strip()]
    return prompts
