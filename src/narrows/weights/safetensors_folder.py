"""Hugging Face safetensors folders: memory mapped, one file or several with an index; only what is asked for is read.

Knows files and tensor names; not which rank asks or why. Errors say which file or tensor is wrong, with the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrows.arch.weights import Weight
from narrows.errors import CheckpointError, ConfigError

__all__ = ["SafetensorsFolder"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsFolder:
    """The tensors of a checkpoint folder. Safe to share between threads: opened files are only read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path: _open(path) for path in self._paths()}
        self._where = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        if any(name.endswith("weight_scale_inv") for name in self._where):
            raise ConfigError(
                f"{folder}: an FP8 block-scaled checkpoint (weight_scale_inv); narrows does not load those yet, "
                "convert it to bfloat16 first"
            )

    def _paths(self) -> list[Path]:
        index = self.folder / _INDEX
        if not index.is_file():
            if (self.folder / _SINGLE).is_file():
                return [self.folder / _SINGLE]
            raise CheckpointError(
                f"{self.folder}: holds neither {_SINGLE} nor {_INDEX}; put the weights there, "
                "or use --load-format dummy to run with random ones"
            )
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index}: not a safetensors index (no 'weight_map' object)") from None
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of the {len(names)} files that {_INDEX} names are missing, "
                f"first {missing[0]}; download the checkpoint again"
            )
        return [self.folder / name for name in names]

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        path = self._where.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing ({len(self._where)} tensors in {len(self._files)} file(s)); "
                "the checkpoint is incomplete, or not the architecture that config.json names"
            )
        view = self._files[path].get_slice(name)
        shape = tuple(view.get_shape())
        if shape != weight.shape:
            raise CheckpointError(f"{path.name}: {name} has shape {shape}, but config.json implies {weight.shape}")
        if span is None:
            return self._files[path].get_tensor(name)
        lo, hi = span
        return view[lo:hi] if weight.dim == 0 else view[:, lo:hi].contiguous()


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes; {str(error).strip()}); download it again"
        ) from None
