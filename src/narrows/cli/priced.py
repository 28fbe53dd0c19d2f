"""Flags that `narrows plan` and `narrows simulate` share: the mesh, dtypes, layouts, limits. Needs no torch."""

from __future__ import annotations

import argparse

from narrows.cost.devices import DTYPES
from narrows.cost.engines import ENGINES, KERNELS_ALONE
from narrows.cost.imbalance import DEFAULT_SKEW
from narrows.cost.network import NETWORKS
from narrows.plan.deploy import DEFAULT_REQUESTS
from narrows.plan.named import ENGINE_LAYOUTS, NAMED_LAYOUTS
from narrows.plan.planner import ENCODE_ROWS, EXPERTS, KV_DTYPES

__all__ = ["add_priced_flags", "add_prompt_rows_flag", "add_requests_flag", "add_revision_flag"]


def add_revision_flag(parser: argparse._ActionsContainer) -> None:
    """``--revision``, for models of the Hugging Face hub."""
    parser.add_argument(
        "--revision", default="", metavar="REV", help="branch, tag or commit of a model of the hub (default: main)"
    )


def add_priced_flags(parser: argparse._ActionsContainer, *, no_layout: str) -> None:
    """``--revision`` to ``--eager``. ``no_layout`` says which layouts are priced if none is named."""
    add_revision_flag(parser)
    add = parser.add_argument
    add("--dp", type=int, default=1, metavar="D", help="attention groups, each with its own requests (default 1)")
    add("--tp", type=int, default=1, metavar="T", help="ranks in each attention group (default 1)")
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of linear weights and their products (default: the checkpoint's)",
    )
    add(
        "--layout",
        action="append",
        default=[],
        metavar="L",
        help=f"repeat to compare several (default: {no_layout}); one of {', '.join(NAMED_LAYOUTS)}; or what an engine "
        f"does in several attention groups: {', '.join(ENGINE_LAYOUTS)}",
    )
    add(
        "--encode-rows",
        choices=tuple(ENCODE_ROWS),
        default="none",
        help="encode rows before gathers where that pays, or always (docs/encoded-rows.md; default none)",
    )
    add(
        "--expert-skew",
        type=float,
        default=DEFAULT_SKEW,
        metavar="A",
        help="exponent of the power law by which experts are chosen; 0: all equally often (default %(default)s)",
    )
    add(
        "--experts",
        choices=EXPERTS,
        default="",
        help="hold a part of every expert on each rank, or whole experts (expert parallelism); default: as published "
        "in named layouts, the cheapest in auto",
    )
    add(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="bf16",
        help="of the KV cache on a GPU (default bf16, or that of float32 activations)",
    )
    add(
        "--engine",
        choices=tuple(ENGINES),
        default=KERNELS_ALONE.name,
        help="add what this engine's host takes to a step, and the overlap of its kernels (docs/published.md; "
        "default %(default)s: kernels one after the other)",
    )
    add(
        "--nodes",
        default="",
        metavar="NxR",
        help="lay the ranks on N nodes of R: hosts, or NVLink domains of several (docs/topology.md; default: one)",
    )
    add(
        "--network",
        choices=tuple(NETWORKS),
        default="",
        help="what connects nodes (default: the device's usual network)",
    )
    add("--eager", action="store_true", help="price kernels launched one by one, not from a CUDA graph")


def add_requests_flag(limits: argparse._ActionsContainer) -> None:
    """``--requests-per-group``, the same number as vLLM's ``--max-num-seqs``."""
    limits.add_argument(
        "--requests-per-group",
        type=int,
        default=DEFAULT_REQUESTS,
        metavar="N",
        help="requests that run at once in each attention group (default %(default)s)",
    )


def add_prompt_rows_flag(limits: argparse._ActionsContainer) -> None:
    """``--prompt-rows``."""
    limits.add_argument(
        "--prompt-rows",
        type=int,
        default=0,
        metavar="N",
        help="most prompt rows of a step that decodes too: fewer make the gaps between tokens even, and prompts slower "
        "(default: as many as --max-rows leaves)",
    )
