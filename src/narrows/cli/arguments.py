"""Flags that several subcommands share, with their defaults read from the engine's config. Parses; decides nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from narrows.engine.config import LOAD_FORMATS, EngineConfig
from narrows.errors import ConfigError

__all__ = ["add_engine_flags", "add_prompt_flags", "engine_options", "read_prompts"]

_DEFAULT = {name: field.default for name, field in EngineConfig.__dataclass_fields__.items()}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL, the mesh, and what an engine holds."""
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder (config.json, safetensors, tokenizer.json), or a .gguf file"
    )
    mesh = parser.add_argument_group("mesh: world = dp x tp ranks, one thread each")
    mesh.add_argument("--dp", type=int, default=_DEFAULT["dp"], help="attention groups (default %(default)s)")
    mesh.add_argument("--tp", type=int, default=_DEFAULT["tp"], help="ranks per group (default %(default)s)")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default=_DEFAULT["dtype"], help="auto (the checkpoint's), bfloat16 or float32")
    engine.add_argument("--device", default=_DEFAULT["device"], help="device that plans are priced for")
    engine.add_argument(
        "--load-format", default=_DEFAULT["load_format"], help=f"{', '.join(LOAD_FORMATS)} (dummy: random weights)"
    )
    engine.add_argument(
        "--checked", action="store_true", help="compare collectives and shapes between ranks at every step"
    )


def engine_options(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The fields of :class:`EngineConfig` that :func:`add_engine_flags` parsed."""
    names = ("dp", "tp", "dtype", "device", "load_format", "checked")
    return {name: getattr(args, name) for name in names} | more


def add_prompt_flags(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Where prompts come from, and whether they are chats."""
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=f"a prompt; repeatable{default}")
    prompts.add_argument("--prompt-file", metavar="FILE", help="a text file, one prompt per line")
    prompts.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that were given, in order; empty if none were."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {args.prompt_file} cannot be read: {error}") from None
        prompts += [line for line in lines if line.strip()]
    return prompts
