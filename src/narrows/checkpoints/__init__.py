"""Models by name: checkpoints that come with the package, and those of the Hugging Face hub.

``model_path`` makes no request; ``local_model`` may.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Literal

from narrows.checkpoints.hub_cache import is_hub_name, is_repo_folder, name_of, repo_folder, snapshot_of
from narrows.errors import CheckpointError, ConfigError

__all__ = ["built_in", "local_model", "model_path", "name_of"]

_FOLDER = Path(__file__).parent


def built_in() -> tuple[str, ...]:
    """The names, in alphabetical order."""
    return tuple(sorted(file.parent.name for file in _FOLDER.glob("*/config.json")))


def model_path(model: str, revision: str = "") -> str:
    """The folder of a built-in checkpoint's name, unless that path exists; the snapshot of a model's folder in the
    hub's cache; ``~`` is the user's home; all else as it is.

    >>> model_path("a/folder")
    'a/folder'

    Raises:
        CheckpointError: the cache's folder has no such snapshot.
        ConfigError: a ``revision`` of a model that has none.
    """
    if model in built_in() and not Path(model).exists():
        path = str(_FOLDER / model)
    else:
        path = os.path.expanduser(model)
        if is_repo_folder(Path(path)):
            return str(snapshot_of(Path(path), revision))
    if revision and not is_hub_name(path):
        raise ConfigError(f"--revision {revision}: {model} has no revisions; models of the hub (org/name) have")
    return path


def local_model(model: str, *, revision: str = "", needed: Literal["config", "text", "weights"]) -> str:
    """The path of a model on this machine. A hub's name (``org/name``, if no such folder is here) is fetched: the
    ``config.json`` alone, all but the weights, or everything. A ``config.json`` that the cache has is not requested.

    Raises:
        ConfigError: neither hub nor cache has it; the message says why.
    """
    path = model_path(model, revision)
    if not is_hub_name(path):
        _check_open(model, path)
        return path
    if needed == "config" and (cached := _cached_config(path, revision)) is not None:
        return str(cached)
    # imported for hub names alone: it takes longer than a whole `narrows plan`
    return str(import_module("narrows.checkpoints.hub").fetch(path, revision, needed))


def _check_open(model: str, path: str) -> None:
    """Refuse a path without permission; a missing path is reported elsewhere."""
    if not model:
        raise ConfigError("the model's name is empty; give a folder, a .gguf file, org/name of the hub, or a preset")
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # no permission, links in a circle, a name that is too long or has a NUL
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{model[:200]!r} cannot be opened ({why})") from None


def _cached_config(name: str, revision: str) -> Path | None:
    try:
        folder = snapshot_of(repo_folder(name, os.environ), revision or "main")
    except CheckpointError:
        return None
    return folder if (folder / "config.json").is_file() else None
