"""The hub's cache of models, as folders: names, revisions and snapshots. No request is made.

HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub
    models--org--name/refs/main              the commit of a branch or tag
    models--org--name/snapshots/<commit>/    its files
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from narrows.errors import CheckpointError, ConfigError
from narrows.files import snapshot_parent

__all__ = ["cache_folder", "is_hub_name", "name_of", "repo_folder", "snapshot_of"]

_PART = r"[A-Za-z0-9](?:[\w.-]*[\w-])?"
_HUB_NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)
_PREFIX = "models--"
_FILES = (".gguf", ".json", ".safetensors", ".bin", ".pt", ".pth")


def is_hub_name(model: str) -> bool:
    """Whether ``model`` has the form of a hub's name, and nothing of that name is here.

    >>> [is_hub_name(m) for m in ("Qwen/Qwen3-8B", "deepseek-v3", "a/b/c", "./a/b", "runs/model.gguf", "org/..")]
    [True, False, False, False, False, False]
    """
    formed = _HUB_NAME.fullmatch(model) is not None and "--" not in model and ".." not in model
    return formed and not model.endswith(_FILES) and not os.path.lexists(model)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the hub's library keeps models.

    >>> str(cache_folder({"HF_HOME": "/data/hf"}))
    '/data/hf/hub'
    """
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def repo_folder(name: str, environ: Mapping[str, str]) -> Path:
    """The cache's folder of ``org/name``, there or not."""
    return cache_folder(environ) / (_PREFIX + name.replace("/", "--"))


def is_repo_folder(path: Path) -> bool:
    """Whether it is a model's folder in the hub's cache."""
    return Path(os.path.abspath(path)).name.startswith(_PREFIX) and (path / "snapshots").is_dir()


def snapshot_of(repo: Path, revision: str) -> Path:
    """The folder of a revision's files; by default of ``main``, or of the only snapshot.

    Raises:
        CheckpointError: there is none, or there are several without a choice.
    """
    snapshots = repo / "snapshots"
    there = sorted(path.name for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    if not there:
        raise CheckpointError(f"{repo}: no snapshot is in it; download the model again")
    wanted = revision or "main"
    if ".." in Path(wanted).parts or Path(wanted).is_absolute():
        raise ConfigError(f"--revision {wanted!r} is no revision: a branch, a tag or a commit is needed")
    ref = repo / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    if commit in there:
        return snapshots / commit
    if not revision and len(there) == 1:
        return snapshots / there[0]
    refs = sorted(str(path.relative_to(repo / "refs")) for path in (repo / "refs").rglob("*") if path.is_file())
    raise CheckpointError(
        f"{repo}: no snapshot of the revision {wanted!r} is in it; it has {len(there)}, such as {(refs or there)[0]}: "
        "choose one with --revision, or give a snapshot's folder"
    )


def name_of(path: Path) -> str:
    """The name of a model at ``path``: ``org/name`` in the hub's cache, else the folder's name.

    >>> name_of(Path("/cache/models--Qwen--Qwen3-8B/snapshots/abc")), name_of(Path("runs/model/"))
    ('Qwen/Qwen3-8B', 'model')
    """
    path = Path(os.path.abspath(path))
    repo = path if path.name.startswith(_PREFIX) else snapshot_parent(path)
    return path.name if repo is None else repo.name.removeprefix(_PREFIX).replace("--", "/", 1)
