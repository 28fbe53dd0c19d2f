"""``narrows eval``: runs tasks on one rank and under layouts, and prints the results side by side.

Exit code 0 if every layout stays within the bounds of docs/eval.md, 1 if one does not.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from narrows.cli.arguments import add_engine_flags, add_limit_flags, engine_options, limit_options
from narrows.cli.console import console
from narrows.cli.eval_tables import document, print_evaluation
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.engine.config import EngineConfig, at_hand, resolve
from narrows.errors import ConfigError
from narrows.evaluate.evaluation import default_files, evaluate
from narrows.evaluate.tasks import FILES, Setting
from narrows.plan.named import NAMED_LAYOUTS, applicable_layouts, inapplicable, named_layout
from narrows.ranks.launch import Launch

__all__ = ["add_parser", "run"]

_RANKS = "processes"
"""The default, as in a server: rank threads capture no decode steps."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows eval``."""
    add_engine_flags(parser, ranks=_RANKS)
    add_limit_flags(parser)
    which = parser.add_argument_group("tasks and layouts")
    which.add_argument(
        "--task", action="append", metavar="NAME", help=f"{', '.join(FILES)}; repeatable (default: all with a file)"
    )
    which.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="TASK=PATH",
        help="a task's file (default: the one in the model's folder eval); repeatable",
    )
    which.add_argument(
        "--layout", action="append", metavar="NAME", help="a layout to evaluate; repeatable (default: auto)"
    )
    which.add_argument("--every-layout", action="store_true", help="all layouts that apply")
    which.add_argument("--limit", type=int, metavar="N", help="items per task, spread over its file (default: all)")
    which.add_argument(
        "--one-at-a-time",
        dest="num_alone",
        type=int,
        default=32,
        metavar="N",
        help="items per task to run a second time, each alone (default %(default)s)",
    )
    which.add_argument(
        "--window", type=int, default=0, metavar="N", help="tokens per window of perplexity (default: at most 512)"
    )
    which.add_argument(
        "--stride", type=int, default=0, metavar="N", help="tokens scored per window (default: half a window)"
    )
    which.add_argument(
        "--shots", type=int, default=5, metavar="N", help="worked examples of gsm8k (default %(default)s)"
    )
    which.add_argument("--chat", action="store_true", help="gsm8k as a chat: worked examples are its earlier turns")
    against = parser.add_argument_group("comparison with one rank")
    against.add_argument(
        "--kl-rows",
        type=int,
        metavar="N",
        help="rows whose distributions are compared; 0: none (default: 2048, or 256 MB of logits)",
    )
    against.add_argument("--no-float32", action="store_true", help="compare distributions in the model's dtype alone")
    against.add_argument("--float32-tasks", action="store_true", help="run the tasks on one rank in float32 too")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``narrows eval``; tables or JSON go to standard output, progress to standard error."""
    check_output(args)
    for flag, value, least in (
        ("limit", args.limit, 1),
        ("one-at-a-time", args.num_alone, 0),
        ("shots", args.shots, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; it must be at least {least}")
    if Launch.of_torchrun(os.environ, world_size=None) is not None:
        raise ConfigError("eval starts its ranks itself, on one host: run it without torchrun")
    options = engine_options(args, ranks=args.ranks or _RANKS, **limit_options(args))
    engine_config = at_hand(EngineConfig(model=args.model, **options))
    files = _files(args, engine_config.model)
    layouts, skipped = _layouts(args, engine_config)
    notes = console(stderr=True)
    evaluation = evaluate(
        engine_config,
        files,
        layouts,
        setting=Setting(limit=args.limit, window=args.window, stride=args.stride, shots=args.shots, chat=args.chat),
        num_alone=args.num_alone,
        kl_rows=args.kl_rows,
        with_float32=not args.no_float32,
        float32_tasks=args.float32_tasks,
        progress=lambda line: notes.print(f"... {line}", markup=False),
    )
    print_evaluation(evaluation, skipped, console(quiet=args.json))
    put_document(args, document(evaluation))
    return 0 if evaluation.ok else 1


def _files(args: argparse.Namespace, model: str) -> dict[str, Path]:
    """The file of each requested task, in the order of the tasks."""
    given: dict[str, Path] = {}
    for pair in args.file:
        task, equals, path = pair.partition("=")
        if not equals or not path or task not in FILES:
            raise ConfigError(f"--file {pair!r} must be TASK=PATH; tasks: {', '.join(FILES)}")
        given[task] = Path(path)
    known = default_files(model) | given
    chosen = args.task or [task for task in FILES if task in known]
    for task in chosen:
        if task not in FILES:
            raise ConfigError(f"--task {task!r} is not known; tasks: {', '.join(FILES)}")
        if task not in known:
            raise ConfigError(
                f"{args.model} has no eval/{FILES[task]} of its own; give one with --file {task}=PATH (docs/eval.md)"
            )
    if not chosen:
        raise ConfigError(f"{args.model} has no tasks of its own; give one with --file TASK=PATH (docs/eval.md)")
    return {task: known[task] for task in FILES if task in chosen}


def _layouts(args: argparse.Namespace, engine_config: EngineConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layouts to run, and for each named layout that does not apply, the reason."""
    if args.layout and args.every_layout:
        raise ConfigError("--every-layout runs all layouts: leave --layout out")
    resolved = resolve(engine_config)
    config, mesh = resolved.config, resolved.mesh
    if engine_config.plan_file and (args.layout or args.every_layout):
        raise ConfigError("--plan runs its own layout at every step: leave --layout and --every-layout out")
    if not args.every_layout:
        for name in args.layout or ():
            named_layout(name, config, mesh)  # one that cannot apply is known before anything runs
        return tuple(dict.fromkeys(args.layout or ("auto",))), {}
    names = applicable_layouts(config, mesh)
    why = {name: inapplicable(name, config, mesh) for name in NAMED_LAYOUTS}
    return names, {name: reason for name, reason in why.items() if reason}
