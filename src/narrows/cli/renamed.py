"""Old spellings of renamed flags, which work for one release with a warning that has the new spelling."""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["add_old_spelling"]


class _OldSpelling(argparse.Action):
    """Stores the value as the new flag does, and prints one line."""

    def __init__(self, option_strings: list[str], dest: str, *, new: str, **options: Any) -> None:
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **options)
        self.new = new

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print(f"{option_string} is now {self.new}; the old spelling ends with the next release", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_old_spelling(parser: Any, old: str, new: str, **options: Any) -> None:
    """Let ``parser`` (or a group of it) accept ``old`` for the flag ``new``, with the same ``options``."""
    parser.add_argument(old, dest=new.lstrip("-").replace("-", "_"), action=_OldSpelling, new=new, **options)
