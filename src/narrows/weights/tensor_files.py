"""Which file of a Hugging Face folder a tensor is read from.

transformers' rule: ``model.safetensors`` if it exists, else the shards of the index. The index decides which shard,
so a stale copy in another is never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from narrows.errors import CheckpointError
from narrows.files import file_in, read_json

__all__ = ["TensorFiles", "open_file", "tensor_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFiles:
    """The open files of a folder.

    ``where``: the file of each tensor by name. ``absent``: tensors that the index puts into a file which lacks them.
    """

    files: dict[Path, Any]
    where: Mapping[str, Path]
    absent: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def tensor_files(folder: Path) -> TensorFiles:
    """Opens the folder's safetensors files.

    Raises:
        CheckpointError: there is none, one is missing, broken or outside the folder, or the index is invalid.
    """
    single, index = file_in(folder, _SINGLE), file_in(folder, _INDEX)
    if single is not None:
        file = open_file(single)
        notes = (f"{folder} holds both {_SINGLE} and {_INDEX}: the first is read, as transformers does",) * bool(index)
        return TensorFiles(files={single: file}, where=dict.fromkeys(file.keys(), single), absent={}, notes=notes)
    if index is None:
        raise CheckpointError(_nothing(folder))
    shards = _shards(folder, index)
    files = {path: open_file(path) for path in dict.fromkeys(shards.values())}
    held = {path: frozenset(file.keys()) for path, file in files.items()}
    where = {name: path for name, path in shards.items() if name in held[path]}
    return TensorFiles(
        files=files,
        where=where | _unlisted(held, shards),
        absent={name: path for name, path in shards.items() if name not in where},
    )


def open_file(path: Path) -> Any:
    """The file, mapped.

    Raises:
        CheckpointError: it is no whole safetensors file.
    """
    try:
        return safe_open(str(path), framework="pt")
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes; {str(error).strip()}); download it again"
        ) from None


def _shards(folder: Path, index: Path) -> dict[str, Path]:
    """The file of each tensor that the index lists."""
    raw = read_json(index)
    names = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names.values()):
        raise CheckpointError(f"{index}: not a safetensors index (no 'weight_map' object from tensors to files)")
    paths = {name: file_in(folder, name) for name in dict.fromkeys(names.values())}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of the {len(paths)} files that {_INDEX} names are missing, "
            f"first {min(missing)}; download the checkpoint again"
        )
    return {tensor: path for tensor, name in names.items() if (path := paths[name]) is not None}


def _unlisted(held: Mapping[Path, frozenset[str]], listed: Mapping[str, Path]) -> dict[str, Path]:
    """Tensors that the index does not list, and that one file alone holds."""
    found: dict[str, list[Path]] = {}
    for path, names in held.items():
        for name in names - listed.keys():
            found.setdefault(name, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def _nothing(folder: Path) -> str:
    """The error of a folder that has neither file, by its files."""

    def there(*patterns: str) -> Sequence[str]:
        return sorted(path.name for pattern in patterns for path in folder.glob(pattern))

    problem = f"{folder}: holds neither {_SINGLE} nor {_INDEX}"
    if shards := there("*.safetensors"):
        return f"{problem}, which says what {shards[0]} and others hold; download it from where they came from"
    if pickles := there(*_PICKLES):
        return (
            f"{problem}, but pickles ({pickles[0]}), which can run code when they are opened; write safetensors once "
            f"with transformers, if you trust them: AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')"
            f".save_pretrained({str(folder)!r})"
        )
    return f"{problem}; put the weights there, or use --load-format dummy to run with random ones"
