"""``narrows bench serve``: sends a load to an OpenAI-compatible server and prints its latencies."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, replace

from rich.progress import Progress

from narrows.bench.plot import check_plot
from narrows.bench.serve.client import Target, look_at, send_all
from narrows.bench.serve.plot import plot_load
from narrows.calibrate.machine import machine
from narrows.cli.console import console
from narrows.cli.loads import (
    LOAD,
    add_load_flags,
    at_least,
    check_load,
    figures_table,
    load_words,
    more_than_0,
    plain,
    save_answers,
    workload,
)
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.errors import ConfigError
from narrows.workload.figures import figures

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows bench serve``."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server's address, without /v1 (default %(default)s)"
    )
    server.add_argument("--model", default="", help="model to ask for (default: the first of /v1/models)")
    server.add_argument(
        "--api-key",
        default=os.environ.get("NARROWS_API_KEY", ""),
        metavar="KEY",
        help="key to send (default: $NARROWS_API_KEY)",
    )
    server.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="API to call (default %(default)s)"
    )
    server.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are random ids below N; 0: words (default: from /server_info)",
    )
    server.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that a request may take (default %(default)g)",
    )
    load = parser.add_argument_group("load")
    add_load_flags(load)
    load.add_argument("--stop-at-eos", action="store_true", help="let the model end a text before its length")
    load.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="untimed requests before the load (default %(default)s)"
    )
    out = add_output_flags(parser)
    out.add_argument("--plot", default="", metavar="FILE", help="draw the latencies (needs the extra 'plot')")
    out.add_argument("--save-requests", default="", metavar="FILE", help="write one line of JSON per request")


def run(args: argparse.Namespace) -> int:
    """Run ``narrows bench serve``; returns 1 if a request failed."""
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
    asks = workload(args, info.get("max_model_len"))
    notes = console(stderr=True)
    if not vocab_size and not target.chat:
        notes.print("prompts are words: the server does not report its vocabulary's size (--vocab-size)", markup=False)
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
    out = console(quiet=args.json)
    out.print(figures_table(found, f"{target.model} at {url}{target.path}: {load_words(args, len(asks))}"))
    for error, count in found.errors.items():
        out.print(f"{count} failed: {error}", markup=False)
    if len(answers) < len(asks):
        out.print(f"interrupted: {len(answers)} of {len(asks)} requests had ended", markup=False)
    if args.save_requests:
        save_answers(answers, args.save_requests)
    if args.plot:
        plot_load(answers, f"{target.model}: {load_words(args, len(asks))}", args.plot)
    document = {
        "bench": "serve",
        "model": target.model,
        "load": {name: plain(getattr(args, name)) for name in ("endpoint", *LOAD)} | {"requests": len(asks)},
        "server": {"version": info.get("version"), **{k: served.get(k) for k in ("mesh", "layout", "dtype", "ranks")}},
        "command": _without(args.api_key, shlex.join(["narrows", *sys.argv[1:]])),
        "machine": where,
        "figures": plain(asdict(found)),
    }
    put_document(args, document)
    if len(answers) < len(asks):
        return 130
    return 1 if found.failed else 0


def _check(args: argparse.Namespace) -> None:
    check_output(args)
    check_load(args)
    for name in ("warmup", "vocab_size"):
        at_least(args, name, 0)
    more_than_0(args, "request_timeout")
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {args.url!r} is no URL; for example http://127.0.0.1:8000")


def _without(secret: str, text: str) -> str:
    return text.replace(secret, "***") if secret else text
