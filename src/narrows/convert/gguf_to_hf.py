"""Converts a GGUF file to a Hugging Face folder. Writes files; what they hold comes from its neighbours.

GGUF                              folder
metadata                          config.json, generation_config.json       (gguf_config)
tokenizer.ggml.*                  tokenizer.json, tokenizer_config.json     (gguf_tokenizer)
tensors, quantised                model.safetensors, dequantised            (gguf_tensors, gguf_values)
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

from narrows.convert.gguf_config import gguf_config, gguf_generation_config
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader, find_gguf
from narrows.convert.gguf_tensors import Target, gguf_targets
from narrows.convert.gguf_tokenizer import tokenizer_backend, write_tokenizer
from narrows.convert.gguf_values import target_pieces
from narrows.convert.safetensors_stream import TensorEntry, check_dtype, write_safetensors
from narrows.errors import ConfigError

__all__ = ["convert_gguf"]


def convert_gguf(source: Path, target: Path, *, dtype: str = "bfloat16") -> Path:
    """Write the Hugging Face folder ``target`` from the GGUF model ``source``, and return ``target``.

    ``source``: a file, any part of a split model, or a folder that holds one model.

    Weights are dequantised, then rounded to ``dtype`` (bfloat16, float16, float32). The folder appears whole or not at
    all: it is written beside ``target`` under another name and renamed at the end. Raises `ConfigError` for what cannot
    be converted (naming what can), and `CheckpointError` for a file that is cut off or contradicts itself.
    """
    source, target = Path(source), Path(target)
    check_dtype(dtype)
    _refuse_existing(target)
    header = GgufHeader(find_gguf(source) or source)
    config = gguf_config(header, dtype=dtype)
    targets = gguf_targets(header, config)
    tokenizer_backend(header)  # refuse a tokenizer before the long part
    file = GgufFile(header)
    entries = [entry for to in targets.values() for entry in _entries(file, to)]
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


def _entries(file: GgufFile, to: Target) -> Iterator[TensorEntry]:
    """The tensor, or one per expert, as files hold them."""
    rows, columns = (0, to.shape[0]), (0, to.shape[-1])
    for expert in range(to.experts or 1):
        pieces = partial(target_pieces, file, to, rows, columns, expert)
        yield TensorEntry(name=to.name.replace("{expert}", str(expert)), shape=to.shape, pieces=pieces)
