"""Reads the results of the engines' own benchmarks, and puts them beside what was predicted.

Known are the lines of ``sglang.bench_serving`` (the last one counts), the JSON of ``vllm bench serve`` and of
TensorRT-LLM's ``benchmark_serving``, which has the same names, and the report of ``trtllm-bench throughput``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrows.advise.search import Trial
from narrows.advise.served import served_bands
from narrows.errors import ConfigError
from narrows.workload.figures import Figures

__all__ = ["Comparison", "Measured", "Row", "compare", "read_measured"]

_LATENCIES = ("ttft", "tpot", "itl", "e2e")
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
_SAME_LOAD = 0.05
"""By how much mean lengths may differ before the loads count as different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a file says. ``latencies``: milliseconds by (which, ``mean``, ``median``, ``p90`` or ``p99``).

    Throughputs are per second; None: not in the file. ``concurrency``: requests at once, at most; 0: no limit.
    """

    file: str
    kind: str
    requests: int
    input_tokens: float
    """Mean of a prompt."""
    output_tokens: float
    """Mean of a text."""
    latencies: Mapping[tuple[str, str], float]
    request_throughput: float | None = None
    output_throughput: float | None = None
    total_throughput: float | None = None
    concurrency: int = 0
    rate: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: as predicted, as measured, and predicted over measured. ``inside``: within the band; None: no band
    is known for it."""

    figure: str
    predicted: float
    measured: float
    inside: bool | None = None

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A result beside the prediction for ``way``. ``words``: which phase was predicted wrongly, and by how much."""

    file: str
    kind: str
    way: str
    rows: tuple[Row, ...]
    words: tuple[str, ...] = field(default_factory=tuple)


def read_measured(file: Path) -> Measured:
    """The result in ``file``.

    Raises:
        ConfigError: it cannot be read, or is no result of a benchmark that is known, with what is missing.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--measured {file} cannot be read: {error}") from None
    found = _document(text)
    if not isinstance(found, dict):
        raise ConfigError(f"--measured {file} is no JSON object, nor lines of them: {_KNOWN}")
    try:
        if "performance" in found and "request_info" in found:
            return _trtllm_bench(str(file), found)
        if "total_throughput" in found and "mean_e2e_latency_ms" in found:
            return _serving(str(file), found, "SGLang bench_serving", "e2e_latency", "total_throughput")
        if "total_token_throughput" in found:
            kind = "vLLM bench serve, or TensorRT-LLM benchmark_serving"
            return _serving(str(file), found, kind, "e2el", "total_token_throughput")
    except KeyError as error:
        raise ConfigError(f"--measured {file} has no {error.args[0]}: {_KNOWN}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--measured {file}: {error}") from None
    raise ConfigError(f"--measured {file} is no result of a benchmark that is known: {_KNOWN}")


_KNOWN = "those of sglang.bench_serving, vllm bench serve, trtllm-bench and TensorRT-LLM's benchmark_serving are read"


def _document(text: str) -> Any:
    """The whole file, or its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (text, *lines[-1:]):
        try:
            return json.loads(part)
        except ValueError:
            continue
    return None


def _serving(file: str, found: Mapping[str, Any], kind: str, e2e: str, total: str) -> Measured:
    completed = int(found["completed"])
    if not completed:
        raise ValueError("no request was completed")
    latencies = {}
    for which, name in zip(_LATENCIES, ("ttft", "tpot", "itl", e2e), strict=True):
        for statistic in ("mean", "median", "p90", "p99"):
            value = found.get(f"{statistic}_{name}_ms")
            if value is not None:
                latencies[which, statistic] = _positive(f"{statistic}_{name}_ms", value)
    for name in ("mean_ttft_ms", "mean_tpot_ms"):
        found[name]  # what there must be at least
    rate = found.get("request_rate")
    return Measured(
        file=file,
        kind=kind,
        requests=completed,
        input_tokens=float(found["total_input_tokens"]) / completed,
        output_tokens=float(found["total_output_tokens"]) / completed,
        latencies=latencies,
        request_throughput=_positive("request_throughput", found["request_throughput"]),
        output_throughput=_positive("output_throughput", found["output_throughput"]),
        total_throughput=_positive(total, found[total]),
        concurrency=int(found.get("max_concurrency") or 0),
        rate=float(rate) if isinstance(rate, int | float) or rate == "inf" else math.inf,
    )


def _trtllm_bench(file: str, found: Mapping[str, Any]) -> Measured:
    load, performance = found["request_info"], found["performance"]
    streaming = found.get("streaming_metrics")
    if not isinstance(streaming, dict):
        raise ValueError("there is no streaming_metrics: run trtllm-bench with --streaming")
    latencies = {("e2e", "mean"): _positive("avg_request_latency_ms", performance["avg_request_latency_ms"])}
    for which in ("ttft", "tpot"):
        latencies[which, "mean"] = _positive(f"avg_{which}_ms", streaming[f"avg_{which}_ms"])
        spread = streaming.get(f"{which}_percentiles") or {}
        for ours, theirs in (("median", "p50"), ("p90", "p90"), ("p99", "p99")):
            if theirs in spread:
                latencies[which, ours] = _positive(f"{which} {theirs}", spread[theirs])
    return Measured(
        file=file,
        kind="trtllm-bench",
        requests=int(load["num_requests"]),
        input_tokens=float(load["avg_input_length"]),
        output_tokens=float(load["avg_output_length"]),
        latencies=latencies,
        request_throughput=_positive("request_throughput_req_s", performance["request_throughput_req_s"]),
        output_throughput=_positive("system_output_throughput_tok_s", performance["system_output_throughput_tok_s"]),
        total_throughput=_positive("system_total_throughput_tok_s", performance["system_total_throughput_tok_s"]),
        concurrency=round(float(load.get("avg_num_concurrent_requests") or 0)),
    )


def _positive(name: str, value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value}, where a number above 0 is needed")
    return number


def compare(measured: Measured, trial: Trial, engine: str) -> Comparison:
    """Predicted beside measured, figure by figure, and where the prediction was wrong."""
    outcome = trial.candidate.outcome
    assert outcome is not None
    figures = outcome.figures
    bands = served_bands(engine, trial)
    rows = [
        Row(
            figure=f"{_NAMES[which]} {statistic}, ms",
            predicted=predicted,
            measured=value,
            inside=_inside(bands.get(which), predicted, value) if statistic == "mean" else None,
        )
        for (which, statistic), value in measured.latencies.items()
        if not math.isnan(predicted := getattr(getattr(figures, f"{which}_ms"), statistic))
    ]
    for name, words in (
        ("request_throughput", "requests per second"),
        ("output_throughput", "output tokens per second"),
        ("total_throughput", "tokens per second, in and out"),
    ):
        value = getattr(measured, name)
        if value is not None:
            rows.append(Row(figure=words, predicted=getattr(figures, name), measured=value))
    return Comparison(
        file=measured.file,
        kind=measured.kind,
        way=f"{trial.candidate.mesh}, {trial.candidate.layout}",
        rows=tuple(rows),
        words=tuple(_words(measured, figures, rows, trial)),
    )


def _inside(band: tuple[float, float] | None, predicted: float, measured: float) -> bool | None:
    return None if band is None else band[0] <= measured / predicted <= band[1]


def _words(measured: Measured, figures: Figures, rows: list[Row], trial: Trial) -> list[str]:
    words = []
    lengths = figures.input_tokens / max(figures.completed, 1), figures.output_tokens / max(figures.completed, 1)
    for ours, theirs, what in zip(lengths, (measured.input_tokens, measured.output_tokens), ("in", "out"), strict=True):
        if abs(ours / theirs - 1) > _SAME_LOAD:
            words.append(
                f"the loads differ: {theirs:.0f} tokens {what} a request were measured, {ours:.0f} are simulated; name "
                "the load that was measured (--trace, or --input-length and --output-length)"
            )
    means = {row.figure: row for row in rows}
    phases = {
        "prompts (TTFT: prefill, waiting, and the way to the scheduler)": ("TTFT mean, ms", "prefill"),
        "decoding (TPOT)": ("TPOT mean, ms", "decode"),
    }
    for phase, (figure, step) in phases.items():
        row = means.get(figure)
        if row is None:
            continue
        verdict = "within its band" if row.inside else "outside its band" if row.inside is False else "no band known"
        off = f"{100 * abs(row.ratio - 1):.0f} % too {'slow' if row.ratio > 1 else 'fast'}"
        at = trial.longest.get(step)
        rested = f"; most of it steps of about {at[0].shape.rows.total} rows" if at is not None else ""
        words.append(f"{phase}: predicted {off} ({verdict}){rested}")
    return words
