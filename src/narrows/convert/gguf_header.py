"""The index of a GGUF model: the metadata of its first file, and where each tensor lies in which of its files.

llama.cpp's ``gguf-split`` cuts a model into files ``NAME-00001-of-00005.gguf``; the first holds the metadata, and each
says which part of how many it is (``split.no``, ``split.count``, ``split.tensors.count``). Pure Python.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from narrows.convert.gguf_part import GgufPart, TensorInfo, shown
from narrows.errors import CheckpointError, ConfigError

__all__ = ["GgufHeader", "find_gguf"]

F32 = 0  # ggml's number of the encoding
PART_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a model's path means, or None if it means none.

    A path that ends in ``.gguf`` means itself: a missing file is called what it should be. A folder without safetensors
    means the one model in it, of which the first part if it is split.

    Raises:
        ConfigError: a folder with several models.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == ".gguf" else None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files or any(path.glob("*.safetensors*")):
        return None
    models = {_model_name(file): file for file in reversed(files)}  # of a split one, the first part
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise ConfigError(f"{path} holds {len(models)} GGUF models; name the file that you mean: {names}")
    return next(iter(models.values()))


def _model_name(file: Path) -> str:
    match = PART_NAME.fullmatch(file.name)
    return f"{match['name']}-of-{match['count']}" if match else file.name


class GgufHeader:
    """What a GGUF model says about itself; its files are closed again when this is made.

    ``path``: the first file's. ``metadata``: its values by key, as plain Python. ``tensors``: of all parts, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the index of the model of which ``path`` is the file, or any part.

        Raises:
            CheckpointError: a file is no GGUF, is cut off within its index, or is not the part that its name says; a
                part is missing.
            ConfigError: a file is written for machines of the other byte order, or of an unknown version.
        """
        self.parts = _read_parts(Path(path))
        self.path = self.parts[0].path
        self.metadata: Mapping[str, Any] = MappingProxyType(self.parts[0].metadata)
        infos = [info for part in self.parts for info in part.tensors]
        self.tensors: dict[str, TensorInfo] = {info.name: info for info in infos}
        if twice := [name for name, count in Counter(info.name for info in infos).items() if count > 1]:
            raise self.parts[0].incomplete(
                f"{len(twice)} of {len(infos)} tensors stand there twice, first {shown(twice[0])}"
            )
        total = self.get("split.tensors.count", int, len(infos))
        if total != len(infos):
            raise CheckpointError(
                f"{self.path}: the {len(self.parts)} parts hold {len(infos)} tensors, but split.tensors.count is "
                f"{total}; fetch all parts of one model"
            )

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """The value of ``key`` as plain Python, or ``default``; `CheckpointError` when it is not of ``kind``.

        ``kind``: bool, int, float (finite; an int will do), str, a list of one of them (``list[str]``), or object for
        any.
        """
        value = self.metadata.get(key, default)
        if value is default or kind is object:
            return value
        values = value if isinstance(value, list) else [value]
        of = kind.__args__[0] if hasattr(kind, "__args__") else kind
        kinds = (float, int) if of is float else (of,)
        if isinstance(value, list) != (of is not kind) or any(type(v) not in kinds for v in values):
            named = f"a list of {of.__name__}" if of is not kind else f"one {of.__name__}"
            raise CheckpointError(f"{self.path}: {key} is {repr(value)[:60]}, where {named} is needed")
        if of is float and not all(map(math.isfinite, values)):
            raise CheckpointError(f"{self.path}: {key} is {repr(value)[:60]}, where a finite number is needed")
        return value

    def need(self, key: str, kind: Any) -> Any:
        """The value of ``key`` as in `get`; `CheckpointError` when the file lacks it."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} has no {key}, which is needed; fetch a complete file")
        return value

    def floats(self, name: str) -> tuple[float, ...]:
        """All values of a small float32 tensor. `ConfigError` if it is encoded otherwise."""
        info = self.tensors[name]
        part = self.parts[info.part]
        if info.encoding != F32:
            raise ConfigError(f"{part.path}: {name} has encoding number {info.encoding}; supported for it: 0 (F32)")
        count = prod(info.shape)
        if info.offset + 4 * count > part.size:
            raise part.incomplete(f"{name} ends at byte {info.offset + 4 * count}")
        with part.path.open("rb") as file:
            file.seek(info.offset)
            return struct.unpack(f"<{count}f", file.read(4 * count))


def _read_parts(path: Path) -> tuple[GgufPart, ...]:
    first = GgufPart(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):  # 0: an unsplit file written by a tool that splits
        return (first,)
    match = PART_NAME.fullmatch(path.name)
    if match is None or type(count) is not int or int(match["count"]) != count:
        raise CheckpointError(
            f"{path} says that it is one of {count!r:.40} parts; parts are found by their names, "
            f"NAME-00001-of-{match['count'] if match else '0000N'}.gguf: give them their own names back, in one folder"
        )
    paths = [path.with_name(f"{match['name']}-{i:05}-of-{count:05}{path.suffix}") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{path} needs {count} parts beside it; {len(missing)} are missing, first {missing[0]}")
    parts = tuple(GgufPart(part, number) for number, part in enumerate(paths))
    for part in parts:
        stated = tuple(part.metadata.get(key) for key in ("split.no", "split.count"))
        if stated != (part.number, count):
            raise CheckpointError(
                f"{part.path} is by its name part {part.number + 1} of {count}, but its split.no is {stated[0]!r:.40} "
                f"(from 0) and its split.count {stated[1]!r:.40}; fetch it again"
            )
    return parts
