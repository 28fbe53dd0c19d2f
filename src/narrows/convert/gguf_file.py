"""Opens a GGUF file and answers for its metadata with clear errors. Knows the container, no architecture.

Layout of GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from narrows.errors import CheckpointError, ConfigError

__all__ = ["GgufFile"]


class GgufFile:
    """A GGUF file, mapped into memory: its metadata by key, its tensors by name."""

    def __init__(self, path: Path) -> None:
        """Map ``path`` and read its index. Raises `CheckpointError` when it is no GGUF file or is cut off."""
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; give the path of a .gguf file")
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{path} ({size} bytes) is not complete GGUF, cut off or of an unknown version: {error}; fetch it again"
            ) from error
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (num_parts := self.get("split.count", 1)) > 1:
            raise ConfigError(f"{path} is one of {num_parts} parts; join them with llama.cpp's gguf-split --merge")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key`` as plain Python, or ``default``."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """The value of ``key``; `CheckpointError` when the file lacks it."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no {key}, which a conversion needs; fetch a complete file")
        return value
