"""``narrows bench layout``: measures every layout at several row counts, beside its predicted times."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from narrows.bench.grid import Grid
from narrows.bench.layout import LayoutWork, layout
from narrows.cli.arguments import engine_options
from narrows.cli.layout_html import grid_page
from narrows.cost.pricer import PHASES
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.errors import ConfigError
from narrows.instruments.trace_file import TraceFile
from narrows.plan.named import applicable_layouts, named_layout

__all__ = ["add_flags", "measure", "write_page"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows bench layout`` beside those of the engine."""
    work = parser.add_argument_group("work")
    work.add_argument(
        "--rows", default="1,8,64,512,2048", metavar="N,N", help="rows of the steps (default %(default)s)"
    )
    work.add_argument(
        "--phase", choices=(*PHASES, "both"), default="both", help="phase of the steps (default %(default)s)"
    )
    work.add_argument(
        "--context", type=int, default=256, metavar="N", help="tokens of a sequence in decode (default %(default)s)"
    )
    work.add_argument(
        "--prompt-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a prompt in prefill (default: one prompt per group)",
    )
    work.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="L",
        help="a layout to measure beside auto; repeatable (default: all that apply)",
    )
    work.add_argument(
        "--seconds-per-cell",
        type=float,
        default=4.0,
        metavar="S",
        help="rounds go on beyond --rounds until a cell (one phase and row count) has taken S seconds (default "
        "%(default)g)",
    )
    work.add_argument("--html", default="", metavar="FILE", help="write a page that draws each layout's layer")
    parser.set_defaults(rounds=3)


def measure(
    args: argparse.Namespace, progress: Callable[[str], None], trace: TraceFile | None = None
) -> tuple[Resolved, Grid]:
    """Measure the layouts. ``trace`` is not used: it would slow the layouts by different amounts.

    Raises:
        ConfigError: a flag has a value that it cannot have.
    """
    for flag in ("seconds_per_cell", "prompt_length"):
        if not getattr(args, flag) >= 0:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(args, flag):g}; it must be at least 0")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ConfigError(f"--html {args.html}: there is no folder {Path(args.html).absolute().parent}")
    engine_config = EngineConfig(model=args.model, **engine_options(args, seed=args.seed))
    resolved = resolve(engine_config)
    config, mesh = resolved.config, resolved.mesh
    work = LayoutWork(
        rows=_rows(args.rows),
        phases=PHASES if args.phase == "both" else (args.phase,),
        context=args.context,
        prompt_length=args.prompt_length,
        seed=args.seed,
    )
    work.check(config)
    for name in args.layout:
        named_layout(name, config, mesh)  # one that cannot apply is known before anything runs
    names = tuple(dict.fromkeys(args.layout)) or applicable_layouts(config, mesh)
    grid = layout(
        engine_config,
        work,
        (*(name for name in names if name != "auto"), "auto"),
        rounds=args.rounds,
        seconds=args.seconds_per_cell,
        warmup=args.warmup,
        progress=progress,
    )
    return resolved, grid


def write_page(args: argparse.Namespace, grid: Grid, title: str, where: Mapping[str, Any]) -> None:
    """Write the page of ``--html``, if the flag is given.

    Raises:
        ConfigError: it cannot be written.
    """
    if not args.html:
        return
    subtitle = f"narrows bench layout on {where['cpu']}, {where['cores']} cores, {where['date']}"
    try:
        Path(args.html).write_text(grid_page(grid, title, subtitle), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {args.html} cannot be written: {error.strerror}") from None


def _rows(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        return ()
