"""Results for programs: a JSON document on standard output (``--json``) or in a file (``--out``)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrows.errors import ConfigError

__all__ = ["add_output_flags", "check_output", "put_document"]


def add_output_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--json`` and ``--out``; a command may add more to the group that is returned."""
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    out.add_argument("--out", default="", metavar="FILE", help="also write the JSON document to FILE")
    return out


def check_output(args: argparse.Namespace) -> None:
    """Check that ``--out`` can be written, before a long measurement.

    Raises:
        ConfigError: its folder is not there.
    """
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {Path(args.out).absolute().parent}")


def put_document(args: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """Print or write the document on one line, as the flags say.

    Raises:
        ConfigError: the file cannot be written.
    """
    if not args.json and not args.out:
        return
    line = json.dumps(document)
    if args.json:
        print(line)
    if args.out:
        try:
            Path(args.out).write_text(f"{line}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {args.out} cannot be written: {error.strerror}") from None
