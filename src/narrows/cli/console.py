"""The console that all commands print on. In a pipe it is so wide that no table or line is cut."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["console"]

_PIPED_WIDTH = 1000


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on standard output or standard error; prints nothing if ``quiet``."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(stderr=stderr, quiet=quiet, highlight=False, width=width, soft_wrap=False)
