"""Results of the engines' own benchmarks, read back: each format, and files that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from engine_results import SGLANG, TRTLLM, VLLM

from narrows.advise.measured import read_measured
from narrows.errors import ConfigError


def put(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "result.json"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("found", "kind", "concurrency", "rate"),
    [(SGLANG, "SGLang", 4, math.inf), (VLLM, "vLLM", 0, 2.5), (TRTLLM, "trtllm-bench", 4, math.inf)],
)
def test_formats(tmp_path: Path, found: dict[str, Any], kind: str, concurrency: int, rate: float) -> None:
    got = read_measured(put(tmp_path, json.dumps(found)))
    assert got.kind.startswith(kind)
    assert (got.requests, got.input_tokens, got.output_tokens) == (10, 100.0, 50.0)
    assert (got.concurrency, got.rate) == (concurrency, rate)
    assert (got.request_throughput, got.output_throughput, got.total_throughput) == (2.0, 100.0, 300.0)
    assert got.latencies["ttft", "mean"] == 200.0 and got.latencies["tpot", "median"] == 10.0
    assert got.latencies["e2e", "mean"] == 700.0
    assert got.latencies.get(("ttft", "p90")) == (None if found is VLLM else 250.0)


def test_the_last_line_of_sglangs_file_counts(tmp_path: Path) -> None:
    lines = [json.dumps(SGLANG | {"mean_ttft_ms": ms}) for ms in (1.0, 2.0, 3.0)]
    assert read_measured(put(tmp_path, "\n".join(lines) + "\n")).latencies["ttft", "mean"] == 3.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"loss": 1}', "no result of a benchmark that is known"),
        (json.dumps({k: v for k, v in VLLM.items() if k != "mean_tpot_ms"}), "has no mean_tpot_ms"),
        (json.dumps(VLLM | {"completed": 0}), "no request was completed"),
        (json.dumps(VLLM | {"mean_ttft_ms": "fast"}), "fast"),
        (json.dumps(SGLANG | {"output_throughput": -1}), "output_throughput is -1"),
        (json.dumps({k: v for k, v in TRTLLM.items() if k != "streaming_metrics"}), "--streaming"),
    ],
)
def test_what_is_no_result(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_measured(put(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_measured(tmp_path / "nothing.json")
