"""Reads the index of one GGUF file: its metadata by key, and where each tensor lies.

Pure Python on purpose, so that rooms without numpy can ask what model a file holds; and faster than the gguf package's
reader, which makes several numpy arrays of every token of a vocabulary (2.8 s for 49 thousand tokens; here 0.03 s).
A model may be split into several such files: `gguf_header`. Values of tensors: `gguf_file`.

Layout of GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narrows.errors import CheckpointError, ConfigError

__all__ = ["GgufPart", "TensorInfo", "shown"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # struct's letter by type of value
TEXT, ARRAY = 8, 9
MAX_DIMS = 4  # ggml's GGML_MAX_DIMS
MAX_TEXT, MAX_ARRAY = 1 << 27, 1 << 24
"""Longer texts (bytes) and arrays (values) than any tokenizer has are taken for a broken file, not read into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor of a file: its shape with rows first (GGUF writes it backwards), the number of its encoding among
    ggml's, where its bytes start in the file, and which part of the model that file is, from 0."""

    name: str
    shape: tuple[int, ...]
    encoding: int
    offset: int
    part: int


class GgufPart:
    """What one GGUF file says about itself. The file is closed again when this is made."""

    def __init__(self, path: Path, number: int = 0) -> None:
        """Read the index of ``path``, which is the model's part ``number``.

        Raises:
            CheckpointError: it is no GGUF file, or is cut off within its index.
            ConfigError: it is written for machines of the other byte order, or of an unknown version.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; give the path of a .gguf file")
        self.path, self.number, self.size = path, number, path.stat().st_size
        self.metadata: dict[str, Any] = {}
        self.tensors: list[TensorInfo] = []
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if magic != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self._read(_Cursor(data, self.size, len(MAGIC)))
                except (ValueError, struct.error) as error:  # ConfigErrors are ValueErrors too, with their own words
                    if isinstance(error, ConfigError):
                        raise
                    raise self.incomplete(str(error)) from error

    def _read(self, cursor: _Cursor) -> None:
        version = cursor.number("I")
        if version not in VERSIONS:
            if version.bit_length() > 16:
                raise ConfigError(f"{self.path} is big-endian GGUF; supported: little-endian, as all published files")
            raise ConfigError(f"{self.path} is GGUF version {version}; supported: versions 2 and 3")
        num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
        for _ in range(num_fields):
            key = cursor.text()
            if key in self.metadata:
                raise ValueError(f"the key {shown(key)} stands there twice")
            self.metadata[key] = cursor.value(cursor.number("I"))
        infos = [self._tensor(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r:.80}")
        base = -(-cursor.at // alignment) * alignment
        self.tensors = [replace(info, offset=base + info.offset) for info in infos]

    def _tensor(self, cursor: _Cursor) -> TensorInfo:
        name, num_dims = cursor.text(), cursor.number("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"the tensor {shown(name)} has {num_dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
        encoding, offset = cursor.number("I"), cursor.number("Q")
        return TensorInfo(name=name, shape=shape, encoding=encoding, offset=offset, part=self.number)

    def incomplete(self, why: str) -> CheckpointError:
        """The error of a file that ends too early or makes no sense."""
        return CheckpointError(f"{self.path} ({self.size} bytes) is not complete GGUF, cut off or broken: {why}")


def shown(name: str) -> str:
    """A name from a file, as one short line: quoted where it is not printable, cut where it is long."""
    return name if name.isprintable() and len(name) <= 80 else f"{name[:80]!r}"


class _Cursor:
    """Reads values one after the other; raises ValueError or struct.error where the file ends or makes no sense."""

    def __init__(self, data: mmap.mmap, size: int, at: int) -> None:
        self.data, self.size, self.at = data, size, at

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Apart from `number`, as vocabularies have 100 thousand texts: no call per text."""
        unpack, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, self.size
        found = []
        for _ in range(count):
            (length,) = unpack(data, at)
            start, at = at + 8, at + 8 + length
            if at > size or length > MAX_TEXT:
                raise ValueError(f"a text of {length} bytes begins at byte {start - 8}")
            found.append(data[start:at].decode("utf-8"))
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array()
        return self.number(self.letter(kind))

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > min(self.size - self.at, MAX_ARRAY):  # an element has at least a byte
            raise ValueError(f"an array of {count} values begins at byte {self.at}")
        if kind == TEXT:
            return self.texts(count)  # arrays of arrays: ggml refuses them, and so does `letter`
        form = f"<{count}{self.letter(kind)}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)

    def letter(self, kind: int) -> str:
        letter = NUMBERS[kind] if kind < len(NUMBERS) else None
        if letter is None:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        return letter
