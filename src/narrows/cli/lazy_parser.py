"""A parser that gets its flags when it first parses, so that only the module of the command that runs is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from narrows.errors import ConfigError

__all__ = ["LazyParser", "add_lazily"]


class LazyParser(argparse.ArgumentParser):
    """Raises errors as ConfigErrors: one line, without the usage that ``--help`` prints.

    ``add_flags``: called once, with this parser, before it parses.
    """

    add_flags: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As the base class, which calls this for subparsers too."""
        if self.add_flags is not None:
            add_flags, self.add_flags = self.add_flags, None
            add_flags(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises a ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_lazily(
    subparsers: argparse._SubParsersAction[LazyParser],
    name: str,
    about: str,
    add_flags: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add a subcommand whose flags are added when it parses. ``about``: a phrase without a full stop."""
    text = f"{about[0].upper()}{about[1:]}."
    parser = subparsers.add_parser(name, help=about, description=text, allow_abbrev=False)
    parser.add_flags = add_flags
