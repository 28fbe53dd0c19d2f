"""Prints an evaluation as tables, and turns it into a JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from narrows.evaluate.compare import Perplexity, Score, Share
from narrows.evaluate.divergence import NOISE_RATIO, Distance
from narrows.evaluate.evaluation import Evaluation, LayoutResult
from narrows.evaluate.served import served_line
from narrows.evaluate.statistics import SIGMAS

__all__ = ["document", "print_evaluation"]


def print_evaluation(evaluation: Evaluation, skipped: Mapping[str, str], out: Console) -> None:
    """Print a table per task and one of distributions, with a row per layout and way of running; then the failures."""
    resolved = evaluation.resolved
    dtype = str(resolved.dtype).removeprefix("torch.")
    out.print(f"{resolved.config.name}: {resolved.mesh} against one rank, {dtype}", markup=False)
    results = [evaluation.one_rank, *([evaluation.exact] if evaluation.exact else []), *evaluation.layouts]
    for task, file in evaluation.files.items():
        out.print(f"\n{task} ({file})", style="bold", markup=False)
        first = next(score for score in evaluation.one_rank.scores if score.task == task)
        out.print(_perplexity_table(results, task) if first.perplexity else _share_table(results, task, first))
    if any(layout.distances for layout in evaluation.layouts):
        out.print("\ndistributions, row by row against one rank in the same dtype", style="bold")
        out.print(_distance_table(evaluation))
        served = [m.distance.served for layout in evaluation.layouts for m in layout.distances if m.dtype == dtype]
        out.print(served_line(dtype, served), markup=False)
    _print_failures(evaluation, out)
    _print_encodings(evaluation, out)
    for name, why in skipped.items():
        out.print(f"not run: {name}: {why}", markup=False)
    for note in resolved.notes:
        out.print(f"note: {note}", markup=False)


def _print_encodings(evaluation: Evaluation, out: Console) -> None:
    """Print the options that round values; rows marked `encoded` differ for that reason."""
    for layout in evaluation.layouts:
        rounded = [f"rows travelled as {', '.join(layout.encodings)} before gathers"] if layout.encodings else []
        if layout.quantization != "none":
            rounded.append(f"weights were held as {layout.quantization}")
        if rounded:
            out.print(f"{layout.layout}: {' and '.join(rounded)}; its distributions have no bound")
        if evaluation.resolved.engine_config.encode_rows != "none" and not layout.encodings:
            out.print(
                f"{layout.layout}: no plan of these steps encodes rows; --encode-rows int8-always encodes all it may"
            )


def document(evaluation: Evaluation) -> dict[str, Any]:
    """All figures by name; NaN and infinity become null."""
    resolved = evaluation.resolved
    found = {
        "model": resolved.engine_config.model,
        "dp": resolved.engine_config.dp,
        "tp": resolved.engine_config.tp,
        "encode_rows": resolved.engine_config.encode_rows,
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "files": {task: str(file) for task, file in evaluation.files.items()},
        "one_rank": asdict(evaluation.one_rank),
        "one_rank_float32": asdict(evaluation.exact) if evaluation.exact else None,
        "layouts": [asdict(layout) | {"failures": layout.failures} for layout in evaluation.layouts],
        "ok": evaluation.ok,
    }
    return _finite(found)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    table.add_column("run")
    for name in columns:
        table.add_column(name, justify="right", no_wrap="±" in name or "(+" in name)
    table.add_column("verdict")
    return table


def _how(alone: bool) -> str:
    return "one by one" if alone else "batched"


def _verdict(failure: str) -> str:
    return "DIFFERS" if failure else "ok"


def _perplexity_table(results: list[LayoutResult], task: str) -> Table:
    table = _table("windows", "tokens", "perplexity", "per word", "bits/byte", "nats more than one rank")
    for result in results:
        for score in result.scores:
            if score.task == task and score.perplexity is not None:
                table.add_row(result.layout, *_perplexity_cells(score, score.perplexity))
    return table


def _perplexity_cells(score: Score, found: Perplexity) -> tuple[str, ...]:
    more = found.more_nats
    return (
        _how(score.alone),
        str(score.num_items),
        str(found.num_tokens),
        f"{found.perplexity:.4f} ± {found.error:.2g}",
        f"{found.word_perplexity:.5g}",
        f"{found.bits_per_byte:.5f}",
        "" if more is None else f"{more.value:+.1e} ± {more.error:.1e}",
        "" if more is None else _verdict(score.failure),
    )


def _share_table(results: list[LayoutResult], task: str, first: Score) -> Table:
    """``+``: items that are right here and wrong on one rank; ``-``: the reverse."""
    table = _table("items", *[f"{name} %  (+ -)" for name in first.shares], *[f"{k} %" for k in first.kinds], "same")
    for result in results:
        for score in result.scores:
            if score.task != task:
                continue
            table.add_row(
                result.layout,
                _how(score.alone),
                str(score.num_items),
                *[_share(share, compared=score.same is not None) for share in score.shares.values()],
                *[f"{100 * score.kinds[kind].share:.1f}" if kind in score.kinds else "-" for kind in first.kinds],
                "" if score.same is None else f"{100 * score.same:.1f} %",
                "" if score.same is None else _verdict(score.failure),
            )
    return table


def _share(share: Share, *, compared: bool) -> str:
    changes = f"  (+{share.gained} -{share.lost})" if compared else ""
    return f"{100 * share.share:.2f} ± {100 * share.error:.2f}{changes}"


def _distance_table(evaluation: Evaluation) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    for name in ("dtype", "run"):
        table.add_column(name)
    for name in ("rows", "KL mean", "KL max", "greedy equal", "near-ties", "other", "beyond", "noise"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for layout in evaluation.layouts:
        for found in layout.distances:
            distance = found.distance
            noise = distance.noise
            table.add_row(
                layout.layout,
                found.dtype,
                _how(found.alone),
                str(distance.num_rows),
                f"{distance.kl:.1e}",
                f"{distance.kl_max:.1e}",
                f"{100 * distance.agreement:.2f} %",
                str(distance.near_ties),
                str(distance.clear_changes),
                "" if distance.beyond is None else f"{100 * distance.beyond:.1f} %",
                "" if noise is None else f"x {math.exp(noise.value):.2f} ± {math.exp(noise.value) * noise.error:.2f}",
                _distance_verdict(distance, rounded=layout.is_rounded),
            )
    return table


def _distance_verdict(distance: Distance, *, rounded: bool) -> str:
    if distance.failure and rounded and distance.served.fault is None:
        return "encoded"
    return "DIFFERS" if distance.failure or distance.served.fault is not None else "ok"


def _print_failures(evaluation: Evaluation, out: Console) -> None:
    for layout in evaluation.layouts:
        for failure in layout.failures:
            out.print(f"{layout.layout}: {failure}", markup=False)
    if evaluation.ok:
        encoded = any(layout.is_rounded for layout in evaluation.layouts)
        aside = " (distributions marked encoded aside)" if encoded else ""
        out.print(
            f"every layout equals one rank{aside}: no figure is further off than {SIGMAS:g} standard errors, sums "
            f"in another order, or x {NOISE_RATIO:g} one rank's own rounding explain (docs/eval.md)"
        )
    else:
        out.print("a figure marked DIFFERS is no rounding: `narrows verify` names the stage and the rank")
