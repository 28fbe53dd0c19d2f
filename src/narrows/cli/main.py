"""`narrows`: finds the subcommand, runs it, and turns errors into one line and an exit code.

Subcommands are imported only when they run, so that `narrows --help` is fast and `narrows plan` never imports torch. A
subcommand is a module with ``add_parser(parser)``, which adds its flags, and ``run(args) -> int``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType

from narrows.cli.lazy_parser import LazyParser, add_lazily
from narrows.errors import ConfigError, NarrowsError

__all__ = ["COMMANDS", "main", "parse"]

_EXTRAS = {"serve": "serve"}
"""The extra that a command needs; all others that need one need ``engine``."""

COMMANDS = (
    # name, module, description
    ("plan", "narrows.cli.plan_command", "price the layouts of a model on a machine, and say which is best and why"),
    (
        "simulate",
        "narrows.cli.simulate_command",
        "run a load on the real scheduler in predicted time; search meshes and layouts under a latency target",
    ),
    (
        "advise",
        "narrows.cli.advise_command",
        "find the best deployment that SGLang, vLLM or TensorRT-LLM can run, as its command line",
    ),
    ("generate", "narrows.cli.generate_command", "generate text from prompts over planned ranks"),
    ("serve", "narrows.cli.serve_command", "answer OpenAI's HTTP API over planned ranks until Ctrl-C or SIGTERM"),
    ("verify", "narrows.cli.verify_command", "compare every layout that applies with one rank, on the real weights"),
    (
        "eval",
        "narrows.cli.eval_command",
        "run tasks under layouts, and compare accuracy and distributions with one rank",
    ),
    ("bench", "narrows.cli.bench_command", "measure layers, collectives, throughput and latency; variants take turns"),
    ("calibrate", "narrows.cli.calibrate_command", "measure this machine's prices, which later plans use"),
    (
        "info",
        "narrows.cli.info_command",
        "say what is installed, and which compiled code, transports and prices hold here",
    ),
    ("convert", "narrows.cli.convert_command", "write a checkpoint folder from a GGUF file, or from the demo model"),
)


class _Version(argparse.Action):
    """Prints the version that is installed; looks it up only then, because that takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        print(f"narrows {import_module('importlib.metadata').version('narrows')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's) and return its exit code.

    0: done. 1: the command's own verdict. 2: a wrong or impossible option; one line on stderr gives the reason.
    130: interrupted.
    """
    try:
        if argv is None:
            command, args = _parse_own()
        else:
            command, args = parse(argv)
        code: int = command.run(args)
        return code
    except NarrowsError as error:
        print(f"narrows: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("narrows: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone (`| head`); the rest that Python flushes at exit is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse_own() -> tuple[ModuleType, argparse.Namespace]:
    """:func:`parse` of this process's own command line, with what a process that is ours alone may set."""
    from narrows.imports import quick_imports  # noqa: PLC0415 - callers of main(argv) do without

    with quick_imports():
        command, args = parse(sys.argv[1:])
    args.fork_self = True
    return command, args


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of the subcommand in ``argv``, and its arguments.

    Raises:
        ConfigError: the subcommand or a flag is unknown, a value is wrong, or a package that the subcommand imports
            comes with an extra that is not installed.
    """
    parser = LazyParser(prog="narrows", description="LLM inference that crosses ranks where activations are narrowest.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: module for name, module, _ in COMMANDS}
    for name, module, about in COMMANDS:
        add_lazily(subparsers, name, about, partial(_add_flags, module))
    try:
        args = parser.parse_args(argv)
        return import_module(modules[args.command]), args
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "narrows"):
            raise  # a mistake of ours
        name = next(arg for arg in argv if arg in modules)
        extra = _EXTRAS.get(name, "engine")
        raise ConfigError(
            f"narrows {name} needs {package}, which is not installed: pip install 'narrows[{extra}]'"
        ) from None


def _add_flags(module: str, parser: argparse.ArgumentParser) -> None:
    import_module(module).add_parser(parser)
