"""Peak memory of rank processes equals the plan's, within a band that holds on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narrows.bench.peak_memory import peak_memory
from narrows.engine.config import EngineConfig

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from /proc, which only Linux has"
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def test_peak_memory_grows_as_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    engine_config = EngineConfig(model=str(tmp_path), tp=2, dtype="bfloat16", load_format="dummy")
    few, many = (peak_memory(engine_config, rows=rows, length=64) for rows in (64, 8192))
    for found in (few, many):
        assert 0.7 * found.peak < found.predicted < 1.4 * found.peak, found
    predicted, measured = many.predicted - few.predicted, many.peak - few.peak
    assert predicted > 40e6  # a flat share would miss this
    assert measured / 3 < predicted < 3 * measured  # machines differ in how much the heap grows
