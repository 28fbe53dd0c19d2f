"""``narrows plan``: prices the layouts of a model on a mesh of devices. Needs no checkpoint, no GPU and no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.cli.plan_tables import print_report
from narrows.cli.priced import add_priced_flags
from narrows.cost.pricer import PHASES
from narrows.errors import ConfigError
from narrows.layout import Mesh, split_evenly
from narrows.plan.named import named_layout
from narrows.plan.report.code import plan_code
from narrows.plan.report.plan_step import plan_step
from narrows.plan.report.saved import write_plan

__all__ = ["add_parser", "run"]

_SCATTERED = "attn-tp-input-scattered"


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows plan``."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a preset such as deepseek-v3, a checkpoint folder, org/name of the hub, or a config.json",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="device of one rank: h20, h100, h200, b200, a100, cpu-core ..., or the file of a profile (default: this "
        "machine's profile, see narrows calibrate)",
    )
    add("--rows", type=int, required=True, metavar="N", help="tokens of the step, all groups together")
    add("--group-rows", metavar="A,B,...", help="tokens of each group (default: spread evenly, larger groups first)")
    add("--logit-rows", type=int, metavar="K", help="tokens whose logits are computed (default: one per sequence)")
    add(
        "--phase",
        choices=PHASES,
        default="prefill",
        help="whether the tokens are prompts or one new token per sequence (default prefill)",
    )
    add("--context", type=int, default=4096, metavar="C", help="length of each sequence in tokens (default 4096)")
    add_priced_flags(parser, no_layout="all that apply")
    add(
        f"--enable-{_SCATTERED}",
        dest="scattered",
        action="store_true",
        help=f"SGLang's switch: add {_SCATTERED} to the layouts of --layout, and refuse a model or mesh that cannot "
        "have it. Without --layout it is compared anyway",
    )
    add(
        "--enable-dp-attention",
        dest="dp_attention",
        action="store_true",
        help="SGLang's switch: --tp counts all ranks, so '--tp 8 --dp 2' is the mesh dp 2 x tp 4",
    )
    output = add_output_flags(parser).add_argument
    output("--html", metavar="FILE", help="write a page that draws each layout's layer as a timeline")
    output("--code", action="store_true", help="print the plan as a straight-line program instead of tables")
    output("--save", metavar="FILE", help="write the plan, to be run with: narrows generate --plan FILE")


def run(args: argparse.Namespace) -> int:
    """Run ``narrows plan``. ``--save`` and ``--code`` use the one named layout, else `auto`.

    Raises:
        ConfigError: an impossible option, with the numbers and the alternative.
    """
    if args.code and args.json:
        raise ConfigError("--code and --json each print the plan: leave one of them out")
    check_output(args)
    notes: list[str] = []
    mesh = _mesh(args, notes)
    if args.scattered:
        notes.append(f"--enable-{_SCATTERED} is the layout {_SCATTERED} here; auto finds it where it is the cheapest")
    report = plan_step(
        args.model,
        revision=args.revision,
        rows=_group_rows(args, mesh),
        **dict(zip(mesh.names, mesh.sizes, strict=True)),
        device=args.device,
        phase=args.phase,
        context=args.context,
        logit_rows=args.logit_rows,
        layouts=_layouts(args),
        dtype=args.dtype or "",
        graph=not args.eager,
        encode_rows=args.encode_rows,
        expert_skew=args.expert_skew,
        notes=notes,
        kv_dtype=args.kv_dtype,
        engine=args.engine,
        experts=args.experts,
        nodes=args.nodes,
        network=args.network,
    )
    if args.scattered:
        named_layout(_SCATTERED, report.deployment.config, mesh)  # refused if it cannot apply, whatever is compared
    one = report.entries[0] if len(report.entries) == 1 else report.auto
    if args.html:
        from narrows.cli.plan_html import report_page  # noqa: PLC0415 - the page's template engine is not needed else

        _write(args.html, report_page(report))
    if args.save:
        write_plan(Path(args.save), one.plan, report.deployment.config, one.sharding)
    if args.code:
        print(plan_code(one.plan), end="")
    elif not args.json:
        print_report(report)
    put_document(args, report.document())
    return 0


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file} cannot be written: {error.strerror}") from None


def _layouts(args: argparse.Namespace) -> tuple[str, ...]:
    """The layouts to compare; none means all that apply, which SGLang's switch does not change."""
    return (*args.layout, _SCATTERED) if args.scattered and args.layout else tuple(args.layout)


def _mesh(args: argparse.Namespace, notes: list[str]) -> Mesh:
    if not args.dp_attention:
        return Mesh.of(dp=args.dp, tp=args.tp)
    if args.dp < 1 or args.tp < 1 or args.tp % args.dp:
        works = ", ".join(str(dp) for dp in range(1, max(args.tp, 1) + 1) if args.tp % dp == 0)
        raise ConfigError(
            f"with --enable-dp-attention --tp counts all ranks, and {args.tp} ranks do not divide into --dp {args.dp} "
            f"attention groups; --dp {works} would"
        )
    mesh = Mesh.of(dp=args.dp, tp=args.tp // args.dp)
    notes.append(
        f"--enable-dp-attention: --tp {args.tp} counts all ranks, so --dp {args.dp} makes this the mesh {mesh}"
    )
    return mesh


def _group_rows(args: argparse.Namespace, mesh: Mesh) -> tuple[int, ...]:
    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: a step has at least 1 row")
    if args.group_rows is None:
        return split_evenly(args.rows, mesh.num_groups)
    try:
        rows = tuple(int(part) for part in args.group_rows.split(","))
    except ValueError:
        raise ConfigError(f"--group-rows {args.group_rows!r}: whole numbers with commas between are needed") from None
    even = ",".join(str(n) for n in split_evenly(args.rows, mesh.num_groups))
    if len(rows) != mesh.num_groups:
        raise ConfigError(
            f"--group-rows has {len(rows)} counts, but {mesh} has {mesh.num_groups} attention groups; "
            f"for example --group-rows {even}"
        )
    if min(rows) < 0 or sum(rows) != args.rows:
        raise ConfigError(
            f"--group-rows {args.group_rows} adds up to {sum(rows)}, where counts >= 0 are needed whose sum is "
            f"--rows {args.rows}; for example {even}"
        )
    return rows
