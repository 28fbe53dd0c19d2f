"""``narrows bench serve``: a load on an OpenAI-compatible server. Parses, sends, prints a table and a line of JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich import box
from rich.progress import Progress
from rich.table import Table

from narrows.bench.machine import machine
from narrows.bench.plot import check_plot
from narrows.bench.serve.client import Target, look_at, send_all
from narrows.bench.serve.plot import plot_load
from narrows.cli.console import console
from narrows.errors import ConfigError
from narrows.loads.figures import Answer, Figures, figures
from narrows.loads.workload import Ask, Prefixes, arrive, random_lengths, read_trace

__all__ = ["ABOUT", "add_flags", "run"]

ABOUT = "a load on an OpenAI-compatible server, and the field's figures (docs/bench-serve.md)"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows bench serve``."""
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1 (default %(default)s)")
    server.add_argument("--model", default="", help="(default: the first of /v1/models)")
    server.add_argument("--api-key", default=os.environ.get("NARROWS_API_KEY", ""), help="(default: $NARROWS_API_KEY)")
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="(%(default)s)")
    server.add_argument(
        "--vocab-size", type=int, help="prompts are random ids below it (default: /server_info's; 0: words instead)"
    )
    server.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help="(default %(default)g)")
    load = parser.add_argument_group("load")
    load.add_argument("--num-requests", type=int, metavar="N", help="(default: 32; of a trace, all)")
    load.add_argument("--concurrency", type=int, default=0, metavar="N", help="at most so many at once (default: all)")
    load.add_argument("--rate", type=float, default=math.inf, metavar="R", help="requests per second (default: all)")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="1: Poisson; less: bursts (default 1)")
    load.add_argument("--input-length", type=int, default=512, metavar="N", help="tokens (default %(default)s)")
    load.add_argument("--output-length", type=int, default=64, metavar="N", help="tokens (default %(default)s)")
    load.add_argument("--spread", type=float, default=0.0, metavar="F", help="lengths vary by that part (default 0)")
    load.add_argument("--prefix-length", type=int, default=0, metavar="N", help="shared tokens before each prompt")
    load.add_argument("--num-prefixes", type=int, default=1, metavar="N", help="how many of them (default 1)")
    load.add_argument("--trace", default="", metavar="FILE", help="arrivals and lengths of real requests")
    load.add_argument("--speed", type=float, default=1.0, metavar="F", help="of the trace's arrivals (default 1)")
    load.add_argument("--scale-lengths", type=float, default=1.0, metavar="F", help="of the trace (default 1)")
    load.add_argument("--stop-at-eos", action="store_true", help="texts end where the model ends them")
    load.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default 0)")
    load.add_argument("--warmup", type=int, default=2, metavar="N", help="requests before (default %(default)s)")
    load.add_argument("--seed", type=int, default=0, help="of lengths, arrivals and prompts (default 0)")
    out = parser.add_argument_group("output")
    out.add_argument("--plot", default="", metavar="FILE", help="draw the latencies (needs the extra 'plot')")
    out.add_argument("--save-requests", default="", metavar="FILE", help="one line of JSON per request")


def run(args: argparse.Namespace) -> int:
    """Run it; 1 if a request failed."""
    _check(args)
    if args.plot:
        check_plot(args.plot)
    where = machine()
    url = args.url.rstrip("/").removesuffix("/v1")
    model, info = look_at(url, args.api_key)
    served = info.get("backend") or {}
    vocab_size = args.vocab_size
    if vocab_size is None:
        vocab_size = int((served.get("model") or {}).get("vocab_size", 0))
    target = Target(
        url=url,
        model=args.model or model,
        api_key=args.api_key,
        chat=args.endpoint == "chat",
        vocab_size=vocab_size,
        ignore_eos=not args.stop_at_eos,
        temperature=args.temperature,
        timeout_s=args.request_timeout,
    )
    asks = _workload(args, info.get("max_model_len"))
    notes = console(stderr=True)
    if not vocab_size and not target.chat:
        notes.print("prompts are words: the server does not say its vocabulary's size (--vocab-size)", markup=False)
    warm = [replace(ask, at_s=0.0) for ask in asks[: args.warmup]]
    warmed = send_all(target, warm, concurrency=1, seed=args.seed + 1, progress=lambda done: None)
    for answer in warmed:
        if answer.error:
            raise ConfigError(f"a request before the load failed: {answer.error}")
    if len(warmed) < len(warm):
        raise KeyboardInterrupt
    with Progress(console=notes, transient=True) as bar:
        task = bar.add_task("requests", total=len(asks))
        answers = send_all(
            target,
            asks,
            concurrency=args.concurrency,
            seed=args.seed,
            progress=lambda done: bar.update(task, completed=done),
        )
    found = figures(answers)
    out = console()
    out.print(_table(found, f"{target.model} at {url}{target.path}", _load_words(args, len(asks))))
    for error, count in found.errors.items():
        out.print(f"{count} failed: {error}", markup=False)
    if len(answers) < len(asks):
        out.print(f"interrupted: {len(answers)} of {len(asks)} requests had ended", markup=False)
    if args.save_requests:
        _save(answers, args.save_requests)
    if args.plot:
        plot_load(answers, f"{target.model}: {_load_words(args, len(asks))}", args.plot)
    document = {
        "bench": "serve",
        "model": target.model,
        "load": {name: _plain(getattr(args, name)) for name in _LOAD} | {"requests": len(asks)},
        "server": {"version": info.get("version"), **{k: served.get(k) for k in ("mesh", "layout", "dtype", "ranks")}},
        "command": _without(args.api_key, shlex.join(["narrows", *sys.argv[1:]])),
        "machine": where,
        "figures": _plain(asdict(found)),
    }
    print(json.dumps(document))
    if len(answers) < len(asks):
        return 130
    return 1 if found.failed else 0


_LOAD = (
    "endpoint",
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


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("num_requests", 1),
        ("concurrency", 0),
        ("input_length", 1),
        ("output_length", 1),
        ("prefix_length", 0),
        ("num_prefixes", 1),
        ("warmup", 0),
        ("vocab_size", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    for name in ("rate", "burstiness", "speed", "scale_lengths", "request_timeout"):
        value = getattr(args, name)
        if not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be more than 0")
    if not 0 <= args.spread < 1:
        raise ConfigError(f"--spread is {args.spread:g}; it must be at least 0 and below 1")
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {args.url!r} is no URL; for example http://127.0.0.1:8000")


def _workload(args: argparse.Namespace, longest: int | None) -> list[Ask]:
    if args.trace:
        if math.isfinite(args.rate):
            raise ConfigError("--trace has its own arrivals: leave --rate out (--speed changes them)")
        return read_trace(
            Path(args.trace),
            args.num_requests or 0,
            speed=args.speed,
            length_scale=args.scale_lengths,
            longest=longest,
        )
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
        raise ConfigError(f"a request has up to {longest_asked} tokens, but the server's context holds {longest}")
    return arrive(asks, args.rate, burstiness=args.burstiness, seed=args.seed) if math.isfinite(args.rate) else asks


def _load_words(args: argparse.Namespace, count: int) -> str:
    rate = f"{args.rate:g} per second" if math.isfinite(args.rate) else "as the trace" if args.trace else "all at once"
    at_once = f", at most {args.concurrency} at once" if args.concurrency else ""
    lengths = Path(args.trace).name if args.trace else f"{args.input_length} in / {args.output_length} out"
    return f"{count} requests, {lengths}, {rate}{at_once}"


def _table(found: Figures, title: str, load: str) -> Table:
    table = Table(title=f"{title}: {load}", title_justify="left", box=box.SIMPLE_HEAD)
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


def _save(answers: list[Answer], file: str) -> None:
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


def _without(secret: str, text: str) -> str:
    return text.replace(secret, "***") if secret else text


def _plain(value: object) -> object:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
