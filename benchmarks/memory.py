"""Predicted beside measured memory of CPU ranks: small models at few and many rows.

    python benchmarks/memory.py [--rows 512,8192]

Models of the shapes of dsv3-mini, dsv2-mini and a Llama with three layers and random weights: what a step takes beside
weights does not depend on how many layers follow each other. Ranks are processes of one host, one thread each. Memory
can be measured on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from narrows.arch.presets import PRESETS
from narrows.bench.peak_memory import peak_memory
from narrows.engine.config import EngineConfig

SMALL = {"num_hidden_layers": 3, "vocab_size": 8000}
MODELS: dict[str, dict[str, Any]] = {
    "dsv3-mini": {**PRESETS["dsv3-mini"], **SMALL},
    "dsv2-mini": {**PRESETS["dsv2-mini"], **SMALL},
    "llama": {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 4096,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        **SMALL,
    },
}
MESHES = ((1, 2), (2, 1))
LENGTH = 512


def main(rows_of: tuple[int, ...]) -> None:
    print("MB on the fullest rank; files that processes map (libraries) not counted")
    print("model      dtype     mesh           rows  process  weights     KV  workspace  predicted  measured   off")
    for name, raw in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
            for dp, tp in MESHES:
                for rows in rows_of:
                    config = EngineConfig(model=folder, dp=dp, tp=tp, dtype="bfloat16", load_format="dummy")
                    found = peak_memory(config, rows=rows, length=min(LENGTH, rows // dp))
                    memory = found.memory
                    parts = (
                        memory.process,
                        memory.weights,
                        found.tokens * memory.kv_per_token,
                        memory.workspace,
                        found.predicted,
                        found.peak,
                    )
                    numbers = "  ".join(f"{part / 1e6:8.1f}" for part in parts)
                    off = found.predicted / found.peak - 1
                    print(f"{name:10s} bfloat16  dp {dp} x tp {tp}  {rows:7d}  {numbers}  {off:+5.0%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: tuple(map(int, text.split(","))), default=(512, 8192))
    main(parser.parse_args().rows)
