"""Converts a GGUF file to a Hugging Face folder. Writes files; what they hold comes from its neighbours.

GGUF                              folder
metadata                          config.json, generation_config.json       (gguf_config)
tokenizer.ggml.*                  tokenizer.json, tokenizer_config.json     (gguf_tokenizer)
tensors, quantised                model.safetensors, dequantised            (gguf_tensors, gguf_file)
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from narrows.convert.gguf_config import gguf_config, gguf_generation_config
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_tensors import Target, gguf_targets, row_order
from narrows.convert.gguf_tokenizer import tokenizer_backend, write_tokenizer
from narrows.convert.safetensors_stream import TensorEntry, check_dtype, write_safetensors
from narrows.errors import ConfigError

__all__ = ["convert_gguf"]


def convert_gguf(source: Path, target: Path, *, dtype: str = "bfloat16") -> Path:
    """Write the Hugging Face folder ``target`` from the GGUF file ``source``, and return ``target``.

    Weights are dequantised, then rounded to ``dtype`` (bfloat16, float16, float32). The folder appears whole or not at
    all: it is written beside ``target`` under another name and renamed at the end. Raises `ConfigError` for what cannot
    be converted (naming what can), and `CheckpointError` for a file that is cut off or contradicts itself.
    """
    source, target = Path(source), Path(target)
    check_dtype(dtype)
    _refuse_existing(target)
    header = GgufHeader(source)
    targets = gguf_targets(header)
    tokenizer_backend(header)  # refuse a tokenizer before the long part
    config = gguf_config(header, dtype=dtype)
    file = GgufFile(header)
    entries = [
        TensorEntry(name=to.name, shape=to.shape, pieces=partial(_pieces, file, name, to))
        for name, to in targets.items()
    ]
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        _write_json(part / "config.json", config)
        _write_json(part / "generation_config.json", gguf_generation_config(header))
        write_tokenizer(header, part, max_length=config["max_position_embeddings"])
        write_safetensors(part / "model.safetensors", entries, dtype=dtype)
        _refuse_existing(target)  # another process may have been faster
        part.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}; name another target folder") from error
    finally:
        rmtree(part, ignore_errors=True)  # nothing to remove when all went well
    return target


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it, or name another target folder")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _pieces(file: GgufFile, name: str, to: Target) -> Iterator[np.ndarray]:
    """Float32 values of a tensor, some rows at a time, in Hugging Face's row order."""
    order = row_order(to)
    if len(to.shape) == 1:
        yield np.concatenate([piece[0] for piece in file.pieces(name, np.zeros(1, int), (0, to.shape[0]))])[order]
        return
    yield from file.pieces(name, order, (0, to.shape[1]))
