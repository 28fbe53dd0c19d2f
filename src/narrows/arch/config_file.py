"""Finds the ``config.json`` of a model; the error lists what the path has instead."""

from __future__ import annotations

from pathlib import Path

from narrows.errors import CheckpointError
from narrows.files import file_in

__all__ = ["config_file"]

_MODEL = "a model is a folder with config.json, org/name of the hub, or a preset"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def config_file(path: Path) -> Path:
    """The ``config.json`` at ``path``, or in the folder ``path``.

    Raises:
        CheckpointError: there is none, or it is not the folder's own; the message lists what the path has instead.
    """
    if not path.is_dir():
        if path.suffix in _WEIGHTS:
            raise CheckpointError(f"{path}: give the folder of this file instead, with its config.json")
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {_MODEL}")
        return path
    file = file_in(path, "config.json")
    if file is not None:
        return file
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path}: holds an adapter (adapter_config.json), not a model: merge it into its base model with peft's "
            "merge_and_unload(), save that, and give its folder"
        )
    raise CheckpointError(f"{path / 'config.json'}: no such file; {_MODEL}")
