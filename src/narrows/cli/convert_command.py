"""``narrows convert``: writes a Hugging Face folder from a GGUF file or the demo model, and prints its path."""

from __future__ import annotations

import argparse
from pathlib import Path

from narrows.convert.demo_model import demo_model
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.errors import ConfigError

__all__ = ["add_parser", "run"]


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows convert``."""
    parser.add_argument("source", metavar="SOURCE", help="a .gguf file, or 'demo' for the demo chat model")
    parser.add_argument("target", metavar="FOLDER", nargs="?", help="folder to write ('demo' goes to the user's cache)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run ``narrows convert``."""
    if args.source == "demo":
        print(demo_model())
        return 0
    if args.target is None:
        raise ConfigError("say where to put the converted model: narrows convert FILE.gguf FOLDER")
    print(convert_gguf(Path(args.source), Path(args.target), dtype=args.dtype))
    return 0
