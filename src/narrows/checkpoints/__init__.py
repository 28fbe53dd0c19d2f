"""Checkpoints that come with the package, by name. PURE: knows their folders; not what is in them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["built_in", "model_path"]

_FOLDER = Path(__file__).parent


def built_in() -> tuple[str, ...]:
    """The names, in alphabetical order."""
    return tuple(sorted(file.parent.name for file in _FOLDER.glob("*/config.json")))


def model_path(model: str) -> str:
    """The folder of a built-in checkpoint's name, unless something of that name is here; ``~`` is the user's home; all
    else as it is.

    >>> model_path("a/folder")
    'a/folder'
    """
    if model in built_in() and not Path(model).exists():
        return str(_FOLDER / model)
    return os.path.expanduser(model)
