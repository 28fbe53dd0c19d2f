"""``narrows verify``: the same numbers under every layout, against one rank or against transformers, and the same bits
from captured decode steps as from op-by-op ones.

Exit code 0 if every layout agrees, 1 if one does not.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from narrows.arch.presets import load_model_config
from narrows.cli.arguments import add_engine_flags, add_prompt_flags, engine_options, read_prompts
from narrows.cli.console import console
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.engine.config import EngineConfig, at_hand
from narrows.engine.model_text import load_model_text
from narrows.errors import ConfigError
from narrows.evaluate.served import ServedReport, verify_served
from narrows.evaluate.transformers_model import load_transformers, transformers_version
from narrows.evaluate.verify import LayoutReport, VerifyReport, verify
from narrows.ranks.launch import Launch

__all__ = ["add_parser", "run"]

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it does so again, because nobody stopped it the first time.",
    "2 + 2 =",
    "Activations cross ranks where they are narrowest.",
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows verify``."""
    add_engine_flags(parser)
    add_prompt_flags(parser, default=" (default: three short texts)")
    parser.set_defaults(dtype="float32")
    parser.add_argument(
        "--layout", action="append", metavar="NAME", help="a layout to verify; repeatable (default: all that apply)"
    )
    parser.add_argument(
        "--against",
        choices=("transformers",),
        help="compare with transformers in float32 instead of with one rank (docs/formats.md); needs pip install "
        "'narrows[against]'",
    )
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="decode steps after the prompts (default %(default)s)"
    )
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``narrows verify``."""
    check_output(args)
    if args.steps < 1:
        raise ConfigError(f"--steps is {args.steps}; it must be at least 1")
    if Launch.of_torchrun(os.environ, world_size=None) is not None:
        raise ConfigError("verify starts its ranks itself, on one host: run it without torchrun")
    engine_config = at_hand(EngineConfig(model=args.model, **engine_options(args)))
    outside, reference = None, "one rank"
    if args.against is not None:
        if engine_config.load_format == "dummy":
            raise ConfigError("--load-format dummy has no checkpoint that --against transformers could read")
        reference = f"transformers {transformers_version()}"
        outside = partial(load_transformers, Path(engine_config.model))
    prompts = _token_ids(args, engine_config.model)
    report = verify(engine_config, prompts, num_decode=args.steps, layouts=args.layout or (), outside=outside)
    served = verify_served(engine_config, prompts, num_decode=args.steps, layouts=args.layout or ())
    out = console(quiet=args.json)
    _print(report, reference, out)
    _print_served(served, out)
    put_document(args, _document(report, served, reference))
    return 0 if report.ok and served.ok else 1


def _token_ids(args: argparse.Namespace, model: str) -> list[list[int]]:
    """The prompts as token ids; without a tokenizer, ids made from the texts' bytes."""
    texts = read_prompts(args) or list(_TEXTS)
    tokenizer = load_model_text(model).tokenizer
    if tokenizer is not None:
        if args.chat:
            return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        return [tokenizer.encode(text) for text in texts]
    vocab_size = load_model_config(model).vocab_size
    return [[byte * 31 % vocab_size for byte in text.encode()] for text in texts]


def _print(report: VerifyReport, reference: str, out: Console) -> None:
    resolved = report.resolved
    rows = max((layout.num_rows for layout in report.layouts), default=0)
    whole = "the logits'" if report.outside else "a stage's"
    out.print(
        f"{resolved.config.name}: {resolved.mesh} against {reference}, {str(resolved.dtype).removeprefix('torch.')}, "
        f"{report.num_steps} steps, {rows} rows; tolerance {report.tolerance:g} of {whole} size"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layout")
    worst = "of their size" if report.outside else "worst stage"
    for name in ("logits: max", "prompt:token", "mean", "KL (nats)", "greedy equal", worst, "expert flips"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for layout in report.layouts:
        table.add_row(
            layout.layout,
            f"{layout.max_logit_difference:.1e}",
            "-" if layout.largest_at is None else f"{layout.largest_at[0]}:{layout.largest_at[1]}",
            f"{layout.mean_logit_difference:.1e}",
            f"{max(layout.kl, 0.0):.1e}",
            f"{100 * layout.agreement:.2f} %",
            f"{layout.worst:.1e}",
            "-" if report.own_experts else _flips(layout),
            "ok" if layout.ok else "DIFFERS",
        )
    out.print(table)
    for layout in report.layouts:
        if layout.encodings:
            travelled = ", ".join(sorted(layout.encodings))
            out.print(f"{layout.layout}: rows travelled as {travelled} before gathers; tolerance {layout.tolerance:g}")
        elif resolved.engine_config.encode_rows != "none":
            out.print(
                f"{layout.layout}: no plan of these steps encodes rows; --encode-rows int8-always encodes all it may"
            )
        if layout.failure:
            out.print(f"{layout.layout}: {layout.failure}")
    if report.outside and not report.ok:
        out.print(_where_to_look(report, reference))
    if report.own_experts:
        out.print("ranks as processes: logits alone were compared, no stages; ranks kept their own choice of experts")
    if resolved.dtype is not torch.float32:
        out.print(
            f"note: what is below {100 * report.tolerance:g} % of a stage's size can be rounding in this dtype; "
            "--dtype float32 has a tolerance of 0.01 %"
        )
    for name, why in report.skipped.items():
        out.print(f"not run: {name}: {why}")
    for note in resolved.notes:
        out.print(f"note: {note}")


def _print_served(served: ServedReport, out: Console) -> None:
    out.print(str(served), markup=False)
    for name, fault in served.faults.items():
        out.print(f"{name}: {fault}", markup=False)


def _document(report: VerifyReport, served: ServedReport, reference: str) -> dict[str, Any]:
    resolved = report.resolved
    return {
        "model": resolved.engine_config.model,
        "mesh": dict(zip(resolved.mesh.names, resolved.mesh.sizes, strict=True)),
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "reference": reference,
        "steps": report.num_steps,
        "tolerance": report.tolerance,
        "layouts": [
            {
                "layout": layout.layout,
                "rows": layout.num_rows,
                "max_logit_difference": layout.max_logit_difference,
                "largest_at": layout.largest_at,
                "mean_logit_difference": layout.mean_logit_difference,
                "kl": layout.kl,
                "greedy_equal": layout.agreement,
                "worst_stage": layout.worst,
                "expert_flips": len(layout.flips),
                "encodings": sorted(layout.encodings),
                "ok": layout.ok,
                "failure": layout.failure,
            }
            for layout in report.layouts
        ],
        "not_run": report.skipped,
        "served": {"path": str(served), "faults": {name: str(fault) for name, fault in served.faults.items()}},
        "ok": report.ok and served.ok,
    }


def _where_to_look(report: VerifyReport, reference: str) -> str:
    """Where to look for the cause when layouts differ from transformers."""
    wrong = [layout.layout for layout in report.layouts if not layout.ok]
    if len(wrong) == len(report.layouts):
        return (
            f"every layout differs from {reference}: look at what they share, that is how config.json is read, the "
            "weights, and the arithmetic of the model; without --against layouts are compared with each other"
        )
    return (
        f"only {', '.join(wrong)} differs from {reference}, so the model is read as it should be: without --against "
        "the first stage that is wrong is named"
    )


def _flips(layout: LayoutReport) -> str:
    if not layout.flips:
        return "0"
    return f"{len(layout.flips)} (margin <= {max(flip.margin for flip in layout.flips):.1e})"
