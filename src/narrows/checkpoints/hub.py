"""Models of the Hugging Face hub, by name: the files that are needed are fetched into the hub's cache.

Only names of the form ``org/name`` lead here, since importing the hub's library takes a quarter of a second. Its own
settings hold: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN. Pickles are never fetched.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils.tqdm import tqdm

from narrows.checkpoints.hub_cache import repo_folder, snapshot_of
from narrows.errors import CheckpointError, ConfigError, NarrowsError
from narrows.files import read_json_object

__all__ = ["Needed", "fetch"]

Needed = Literal["config", "text", "weights"]
"""``config.json`` alone; all that is read but weights; everything."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    _INDEX,
    # not read; there so that transformers can make a tokenizer.json of it
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
]
_ROOM = "make room, or name another folder with HF_HUB_CACHE"
_RESERVE = 1 << 26
"""Bytes that stay free on the cache's disk."""


class _Bar(tqdm):
    """A progress bar, if a person sees it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": not sys.stderr.isatty()})  # type: ignore[no-untyped-call]


class _NoBar(tqdm):
    """A progress bar of calls that take no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


def fetch(name: str, revision: str, needed: Needed) -> Path:
    """The folder, in the hub's cache, of the files of ``org/name`` that are ``needed``.

    The hub gives the commit and the files of the revision; files that the cache has are not fetched again. If
    the hub does not answer, or denies access, the cache's snapshot is used if it is complete.

    Raises:
        ConfigError: the model, the revision or the right to read it is not there, or neither hub nor cache has it.
    """
    with _in_one_line(name, revision):
        try:
            found = HfApi(library_name="narrows").model_info(name, revision=revision or None, files_metadata=True)
        except RevisionNotFoundError:
            raise
        except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled) as error:
            return _cached(name, revision, needed, error)
        files = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        if "config.json" not in files:
            raise CheckpointError(_no_model(name, files))
        text = ["config.json"] if needed == "config" else _TEXT
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=text, tqdm_class=_NoBar))
        if needed == "weights":
            _fetch_weights(name, folder, files)
    return folder


def _cached(name: str, revision: str, needed: Needed, error: Exception) -> Path:
    """The cache's snapshot, if it is whole.

    Raises:
        ConfigError: it is not there or lacks files, and why the hub does not give them.
    """
    repo = repo_folder(name, os.environ)
    try:
        folder = snapshot_of(repo, revision or "main")
    except CheckpointError:
        if isinstance(error, HfHubHTTPError):
            raise error from None
        what = f"the revision {revision!r} of {name}" if revision else name
        raise ConfigError(f"{what} is neither a folder here nor in the cache ({repo}), and {_silent()}") from None
    files = ["config.json"]
    if needed == "weights" and not (folder / _SINGLE).is_file():
        files += _shards(folder) or [_SINGLE]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        why = _refused(name, error) if isinstance(error, HfHubHTTPError) else _silent()
        raise CheckpointError(f"the cache ({folder}) lacks {len(missing)} file(s), such as {missing[0]}, and {why}")
    if not constants.HF_HUB_OFFLINE:
        logging.getLogger("narrows.checkpoints").warning(
            "%s does not answer (%s): %s is read from the cache, commit %s",
            constants.ENDPOINT,
            _words(error),
            name,
            folder.name,
        )
    return folder


def _fetch_weights(name: str, folder: Path, files: Mapping[str, int]) -> None:
    """The safetensors files that are read, and no others; ``files`` are the repository's, with their sizes."""
    wanted = [_SINGLE] if _SINGLE in files else _shards(folder)
    if not wanted or any(file not in files for file in wanted):
        raise CheckpointError(_no_model(name, files))
    to_come = sum(files[file] for file in wanted if not (folder / file).exists())
    free = shutil.disk_usage(folder).free
    if to_come and to_come + _RESERVE > free:
        raise ConfigError(
            f"{name} takes {to_come / 1e9:.1f} GB more on the disk of {constants.HF_HUB_CACHE}, which has "
            f"{free / 1e9:.1f} GB free; {_ROOM}"
        )
    # Escaped, since a file's name is no pattern. By its commit: a branch may have moved since.
    names = [glob.escape(file) for file in wanted]
    snapshot_download(name, revision=folder.name, allow_patterns=names, tqdm_class=_Bar)


def _shards(folder: Path) -> list[str]:
    """The files that the index names."""
    if not (folder / _INDEX).is_file():
        return []
    names = read_json_object(folder / _INDEX).get("weight_map")
    files = names.values() if isinstance(names, dict) else ()
    return sorted({file for file in files if isinstance(file, str)})


def _silent() -> str:
    """Why no request goes to the hub, and what to do."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or copy the model's folder of a cache that has it"
    return f"{constants.ENDPOINT} does not answer: check the network, or give a folder"


def _no_model(name: str, listed: Iterable[str]) -> str:
    """The error of a repository without config.json or safetensors, by its files."""
    listed = sorted(listed)
    ggufs, pickles = ([f for f in listed if f.endswith(ends)] for ends in ((".gguf",), (".bin", ".pt", ".pth")))
    if ggufs:
        return (
            f"{name} on the hub holds GGUF files ({len(ggufs)}): fetch one, such as with "
            f"`hf download {name} {ggufs[0]}`, and give that file"
        )
    if "adapter_config.json" in listed:
        return f"{name} on the hub is an adapter, not a model: merge it into its base model with peft, and give that"
    if pickles and "config.json" in listed:
        return (
            f"{name} on the hub holds pickles ({pickles[0]}) and no safetensors; pickles can run code and are not "
            f"read: AutoModelForCausalLM.from_pretrained({name!r}, dtype='auto').save_pretrained(FOLDER) writes some"
        )
    return f"{name} on the hub is no whole model: it needs config.json, and {_SINGLE} or the files of {_INDEX}"


@contextmanager
def _in_one_line(name: str, revision: str) -> Iterator[None]:
    """An error of the hub's library, as one line with the way out."""
    hub = constants.ENDPOINT
    try:
        yield
    except NarrowsError:
        raise
    except HFValidationError:
        raise ConfigError(f"{name!r} is neither a folder here nor a name of the hub (org/name)") from None
    except GatedRepoError:
        raise ConfigError(
            f"{name} is gated: accept its terms at {hub}/{name}, and set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name} is neither a folder here nor a model that {hub} shows ({error.response.status_code}): check the "
            "name; for a private model set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{name} has no revision {revision or 'main'!r}; {hub}/{name}/tree/main lists them") from None
    except HfHubHTTPError as error:
        raise ConfigError(_refused(name, error)) from None
    except (httpx2.HTTPError, LocalEntryNotFoundError, XetDownloadError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: the download from {hub} broke off ({_words(error)}); run the command again to continue"
        ) from None
    except (ValueError, TypeError, KeyError) as error:  # the library cannot read the response
        raise ConfigError(f"{name}: {hub} does not answer like a hub ({_words(error)}); check HF_ENDPOINT") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{name}: the disk of {constants.HF_HUB_CACHE} is full; {_ROOM}") from None
        raise ConfigError(
            f"{name} cannot be fetched into {constants.HF_HUB_CACHE} ({_words(error)}); another folder is set by "
            "HF_HUB_CACHE"
        ) from None


def _refused(name: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return f"{name}: {constants.ENDPOINT} refuses it ({status}); set HF_TOKEN to a token that may read it"
    way_out = "wait a little" if status == 429 else "try again later"
    return f"{name}: {constants.ENDPOINT} answers {status}; {way_out}, or give a folder"


def _words(error: Exception) -> str:
    """An error on one line, not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
