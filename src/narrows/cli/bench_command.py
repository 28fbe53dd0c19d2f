"""``narrows bench``: its kinds, each of which is imported only when it runs: `bench serve` needs no torch."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from typing import Any

from narrows.cli.lazy_parser import LazyParser, add_lazily

__all__ = ["KINDS", "add_parser", "run"]

KINDS = {
    "layout": "every layout over a grid of row counts: prices against measured time, the choice against the best",
    "layer": "where the time of one step goes, per layout, with the predicted time",
    "collectives": "every collective by size, beside memcpy and other implementations",
    "offline": "throughput of requests of equal lengths",
    "latency": "prompts by length and decode steps by batch, beside the machine's roofline",
    "serve": "a load on an OpenAI-compatible server, and the field's figures (docs/bench-serve.md)",
}


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The kinds of ``narrows bench``."""
    kinds = parser.add_subparsers(dest="bench", metavar="KIND", required=True, parser_class=LazyParser)
    for kind, about in KINDS.items():
        add_lazily(kinds, kind, about, partial(_add_flags, kind))


def run(args: argparse.Namespace) -> int:
    """Run ``narrows bench``."""
    code: int = _module(args.bench).run(args)
    return code


def _add_flags(kind: str, parser: argparse.ArgumentParser) -> None:
    if kind == "serve":
        _module(kind).add_flags(parser)
    else:
        _module(kind).add_flags(parser, kind)


def _module(kind: str) -> Any:
    return import_module(f"narrows.cli.bench_{'serve' if kind == 'serve' else 'engine'}_command")
