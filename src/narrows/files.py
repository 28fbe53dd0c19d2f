"""Reads the files of a model's folder: regular files that lie in it, whole, JSON with or without a byte order mark.

A checkpoint is somebody else's data, so a name in it never leads out of its folder. The one exception is the hub's
cache, whose folders hold links to the files beside them:

    models--org--name/blobs/<hash>                      the files
    models--org--name/snapshots/<commit>/config.json    -> ../../blobs/<hash>
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from narrows.errors import CheckpointError

__all__ = ["file_in", "read_json", "read_json_object", "read_text", "snapshot_parent"]


def snapshot_parent(folder: Path) -> Path | None:
    """The ``models--org--name`` folder of the hub's cache that ``folder`` is, or lies in, a snapshot of; else None."""
    for inner in (folder, *folder.parents):
        snapshots = inner.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return None


def file_in(folder: Path, name: str) -> Path | None:
    """The file called ``name`` (a relative path) in ``folder``; None if there is none.

    Raises:
        CheckpointError: the name or a link leads out of the folder, a link leads nowhere, or it is no regular file.
    """
    pure = PurePath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise CheckpointError(f"{folder}: the file {name!r} is outside the folder; only files in it are read")
    path = folder / name
    try:
        if path.is_file():
            _refuse_outside(folder, path)
            return path
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder, where a file is needed")
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which is not there; download it again")
        if path.exists():
            raise CheckpointError(f"{path}: is no regular file")
    except OSError as error:  # no permission, a name that is too long
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return None


def _refuse_outside(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder and is not the hub cache's own."""
    home, real = folder.resolve(), path.resolve()
    cached = snapshot_parent(home)
    if real.is_relative_to(home) or (cached is not None and real.parent == cached / "blobs"):
        return
    raise CheckpointError(
        f"{path}: is a link to {real}, outside the folder; only files in it are read: put the file itself there"
    )


def read_json(path: Path, *, strict: bool = False) -> Any:
    """What a JSON file holds: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    ``strict``: a name that stands twice in an object is an error, of which Python keeps the last without a word, and so
    are NaN and Infinity, which JSON does not have.

    Raises:
        CheckpointError: it cannot be read, or is not JSON.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _object, "parse_constant": _no_constant} if strict else {}
    try:
        return json.loads(_read(path), **hooks)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {name!r} appears twice in one object")
        fields[name] = value
    return fields


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def read_json_object(path: Path | None, *, strict: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is no such file (None). ``strict``: as `read_json` has it.

    Raises:
        CheckpointError: it cannot be read, or holds anything else.
    """
    if path is None:
        return {}
    value = read_json(path, strict=strict)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, where an object is needed")
    return value


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, less a byte order mark.

    Raises:
        CheckpointError: it cannot be read, or is not UTF-8.
    """
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error}); download it again") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
