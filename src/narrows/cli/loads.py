"""The flags of loads that ``bench serve`` and ``simulate`` share, and the table of a load's figures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from narrows.errors import ConfigError
from narrows.workload.arrivals import Ask, Prefixes, arrive, fitted, flood, random_lengths, read_trace
from narrows.workload.figures import Answer, Figures

__all__ = [
    "FLOOD",
    "LOAD",
    "add_flood_flags",
    "add_load_flags",
    "at_least",
    "check_flood",
    "check_load",
    "figures_table",
    "load_words",
    "more_than_0",
    "plain",
    "save_answers",
    "with_flood",
    "workload",
]

LOAD = (
    "concurrency",
    "rate",
    "burstiness",
    "input_length",
    "output_length",
    "spread",
    "prefix_length",
    "num_prefixes",
    "trace",
    "speed",
    "scale_lengths",
    "seed",
)
"""The flags that decide a load."""

FLOOD = ("flood", "flood_input_length", "flood_output_length", "flood_at", "fair_shares")
"""The flags of the client that sends many requests at once beside the load."""


def add_load_flags(load: argparse._ArgumentGroup) -> None:
    """Number, arrival times, lengths and shared prefixes of requests."""
    load.add_argument("--num-requests", type=int, metavar="N", help="number of requests (default: 32; of a trace, all)")
    load.add_argument(
        "--concurrency", type=int, default=0, metavar="N", help="requests at once, at most (default: all)"
    )
    load.add_argument(
        "--rate", type=float, default=math.inf, metavar="R", help="requests per second (default: all at the start)"
    )
    load.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1: Poisson arrivals; less: bursts (default 1)"
    )
    load.add_argument(
        "--input-length", type=int, default=512, metavar="N", help="tokens of a prompt (default %(default)s)"
    )
    load.add_argument(
        "--output-length", type=int, default=64, metavar="N", help="tokens of a text (default %(default)s)"
    )
    load.add_argument(
        "--spread", type=float, default=0.0, metavar="F", help="lengths vary by this fraction (default 0)"
    )
    load.add_argument(
        "--prefix-length", type=int, default=0, metavar="N", help="tokens of a shared prefix before each prompt"
    )
    load.add_argument(
        "--num-prefixes", type=int, default=1, metavar="N", help="number of different prefixes (default 1)"
    )
    load.add_argument(
        "--trace", default="", metavar="FILE", help="take arrivals and lengths of real requests from FILE"
    )
    load.add_argument(
        "--speed", type=float, default=1.0, metavar="F", help="speed up the trace's arrivals by F (default 1)"
    )
    load.add_argument(
        "--scale-lengths", type=float, default=1.0, metavar="F", help="multiply the trace's lengths by F (default 1)"
    )
    load.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sampling temperature (default 0: greedy)"
    )
    load.add_argument("--seed", type=int, default=0, help="seed of lengths, arrivals and prompts (default 0)")


def add_flood_flags(load: argparse._ArgumentGroup) -> None:
    """A client that sends many requests at once, beside the load."""
    load.add_argument("--flood", type=int, default=0, metavar="N", help="add a client that asks for N texts at once")
    load.add_argument("--flood-input-length", type=int, default=512, metavar="N", help="tokens (default %(default)s)")
    load.add_argument("--flood-output-length", type=int, default=1024, metavar="N", help="tokens (default %(default)s)")
    load.add_argument(
        "--flood-at", type=float, default=0.0, metavar="S", help="seconds before that client comes (default 0)"
    )
    load.add_argument(
        "--no-fair-shares",
        dest="fair_shares",
        action="store_false",
        help="serve requests in order of arrival, whichever client sent them",
    )


def check_flood(args: argparse.Namespace) -> None:
    """Refuse values that no flood can have.

    Raises:
        ConfigError: with the flag and its bounds.
    """
    for name, least in (("flood", 0), ("flood_input_length", 1), ("flood_output_length", 1)):
        at_least(args, name, least)
    if not 0 <= args.flood_at < math.inf:
        raise ConfigError(f"--flood-at is {args.flood_at:g}; it must be at least 0 seconds")
    if args.flood and args.concurrency:
        raise ConfigError("--flood comes all at once: leave --concurrency out (--rate spreads the other requests)")


def with_flood(args: argparse.Namespace, asks: Sequence[Ask], longest: int) -> list[Ask]:
    """The requests and those of the flood, if there is one.

    Raises:
        ConfigError: a request of the flood has more than ``longest`` tokens.
    """
    tokens = args.flood_input_length + args.flood_output_length
    if args.flood and tokens > longest:
        raise ConfigError(f"a text of the flood has {tokens} tokens, but the context holds {longest}")
    return [*asks, *flood(args.flood, args.flood_input_length, args.flood_output_length, at_s=args.flood_at)]


def at_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a smaller value of the flag called ``name`` (with underscores).

    Raises:
        ConfigError: it is smaller.
    """
    value = getattr(args, name)
    if value is not None and value < least:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def more_than_0(args: argparse.Namespace, name: str) -> None:
    """Refuse a value of the flag called ``name`` that is not positive.

    Raises:
        ConfigError: it is not.
    """
    value = getattr(args, name)
    if value is not None and not value > 0:
        raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be more than 0")


def _finite(args: argparse.Namespace, name: str) -> None:
    if not math.isfinite(value := getattr(args, name)):
        raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; a finite number is needed")


def check_load(args: argparse.Namespace) -> None:
    """Refuse values that no load can have.

    Raises:
        ConfigError: with the flag and its bounds.
    """
    for name, least in (
        ("num_requests", 1),
        ("concurrency", 0),
        ("input_length", 1),
        ("output_length", 1),
        ("prefix_length", 0),
        ("num_prefixes", 1),
    ):
        at_least(args, name, least)
    for name in ("rate", "burstiness", "speed", "scale_lengths"):
        more_than_0(args, name)
    for name in ("burstiness", "speed", "scale_lengths", "temperature"):
        _finite(args, name)
    if args.temperature < 0:
        raise ConfigError(f"--temperature is {args.temperature:g}; it must be at least 0")
    if not 0 <= args.spread < 1:
        raise ConfigError(f"--spread is {args.spread:g}; it must be at least 0 and below 1")


def workload(args: argparse.Namespace, longest: int | None) -> list[Ask]:
    """The requests that the flags describe; ``longest``: tokens that a context holds, if known.

    Raises:
        ConfigError: a trace that cannot be read, flags that contradict each other, or requests that are too long.
    """
    if args.trace:
        if math.isfinite(args.rate):
            raise ConfigError("--trace has its own arrivals: leave --rate out (--speed changes them)")
        asks = read_trace(Path(args.trace), args.num_requests or 0, speed=args.speed, length_scale=args.scale_lengths)
        return asks if longest is None else _fitted(asks, longest)
    asks = random_lengths(
        args.num_requests or 32,
        args.input_length,
        args.output_length,
        spread=args.spread,
        seed=args.seed,
        prefixes=Prefixes(count=args.num_prefixes, tokens=args.prefix_length),
    )
    longest_asked = max(ask.input_tokens + ask.output_tokens for ask in asks)
    if longest is not None and longest_asked > longest:
        raise ConfigError(f"a request has up to {longest_asked} tokens, but the context holds {longest}")
    return arrive(asks, args.rate, burstiness=args.burstiness, seed=args.seed) if math.isfinite(args.rate) else asks


def _fitted(asks: list[Ask], longest: int) -> list[Ask]:
    """The requests cut to the context, with a line on standard error if any is cut."""
    short = fitted(asks, longest)
    lost = [
        before.input_tokens + before.output_tokens - after.input_tokens - after.output_tokens
        for before, after in zip(asks, short, strict=True)
    ]
    if cut := sum(tokens > 0 for tokens in lost):
        print(
            f"narrows: {cut} of {len(asks)} requests of the trace are longer than a context of {longest} tokens, and "
            f"lose {sum(lost)} tokens of their prompts; --max-context",
            file=sys.stderr,
        )
    return short


def load_words(args: argparse.Namespace, count: int) -> str:
    """A description of the load in a few words."""
    rate = f"{args.rate:g} per second" if math.isfinite(args.rate) else "as the trace" if args.trace else "all at once"
    at_once = f", at most {args.concurrency} at once" if args.concurrency else ""
    lengths = Path(args.trace).name if args.trace else f"{args.input_length} in / {args.output_length} out"
    return f"{count} requests, {lengths}, {rate}{at_once}"


def figures_table(found: Figures, title: str) -> Table:
    """The figures of one load: counts and throughputs, then the latencies."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "mean", "median", "p90", "p99"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, value in (
        ("requests completed / failed", f"{found.completed} / {found.failed}"),
        ("duration, s", f"{found.duration_s:.2f}"),
        ("tokens in (cached) / out", f"{found.input_tokens} ({found.cached_tokens}) / {found.output_tokens}"),
        ("requests per second", f"{found.request_throughput:.2f}"),
        ("output tokens per second", f"{found.output_throughput:.1f}"),
        ("tokens per second, in and out", f"{found.total_throughput:.1f}"),
        ("most requests at once", str(found.peak_concurrency)),
    ):
        table.add_row(name, value)
    for name, latency in (
        ("TTFT, ms", found.ttft_ms),
        ("TPOT, ms", found.tpot_ms),
        ("ITL, ms", found.itl_ms),
        ("E2E, ms", found.e2e_ms),
    ):
        table.add_row(name, *(f"{value:.2f}" for value in asdict(latency).values()))
    return table


def save_answers(answers: Sequence[Answer], file: str) -> None:
    """Write a line of JSON per request, with times relative to the first request.

    Raises:
        ConfigError: the file cannot be written.
    """
    begin = min((answer.sent_s for answer in answers), default=0.0)
    try:
        with Path(file).open("w", encoding="utf-8") as out:
            for answer in answers:
                row = asdict(answer)
                row |= {name: row[name] - begin for name in ("sent_s", "ended_s")}
                row["pieces_s"] = [at - begin for at in answer.pieces_s]
                out.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"--save-requests {file} cannot be written: {error}") from None


def plain(value: object) -> object:
    """The value with infinity and NaN as None, for JSON."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
