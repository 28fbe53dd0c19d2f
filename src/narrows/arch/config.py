"""Reads a ``config.json`` into a :class:`~narrows.arch.model.ModelConfig`; ``configs/`` has one schema per family."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from narrows.arch.config_file import config_file
from narrows.arch.configs.deepseek import DeepseekV2, DeepseekV3
from narrows.arch.configs.glm import Glm4Moe
from narrows.arch.configs.llama import Llama
from narrows.arch.configs.mistral import Mistral
from narrows.arch.configs.qwen import Qwen2, Qwen3, Qwen3Moe
from narrows.arch.configs.schema import Schema
from narrows.arch.configs.shown import shown
from narrows.arch.model import GQA, MLA, CheckpointQuantization, ModelConfig, MoE
from narrows.errors import CheckpointError, ConfigError
from narrows.files import read_json_object

__all__ = ["CONFIG_SCHEMAS", "GQA", "MLA", "CheckpointQuantization", "MoE", "ModelConfig", "read_config"]

CONFIG_SCHEMAS: Mapping[str, type[Schema]] = MappingProxyType(
    {
        model_type: schema
        for schema in (DeepseekV2, DeepseekV3, Llama, Mistral, Qwen2, Qwen3, Qwen3Moe, Glm4Moe)
        for model_type in schema.model_types
    }
)
"""The schema of each ``model_type``."""


def read_config(source: Path | Mapping[str, Any], name: str = "") -> ModelConfig:
    """The model that a ``config.json`` (or a folder with one, or its parsed content) describes.

    Raises:
        CheckpointError: no ``config.json``, or it is not JSON, or a field is missing or has an invalid value.
        ConfigError: an unsupported architecture, or an unsupported variant of one.
    """
    if not isinstance(source, Path):
        return _read(source, name or "config", name or "config")
    file = config_file(source)
    raw = read_json_object(file, strict=True)
    return _read(raw, str(file), name or Path(os.path.abspath(file)).parent.name)


def _read(raw: Mapping[str, Any], where: str, name: str) -> ModelConfig:
    try:
        return _schema(raw).read(raw, name)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _schema(raw: Mapping[str, Any]) -> type[Schema]:
    known = ", ".join(sorted(CONFIG_SCHEMAS))
    given = raw.get("model_type")
    if given is None:
        raise ConfigError(f"model_type is missing, which names the architecture; supported are {known}")
    if not isinstance(given, str):
        raise CheckpointError(f"model_type is {shown(given)}, where a text is needed")
    if given not in CONFIG_SCHEMAS:
        raise ConfigError(f"architecture {shown(given)} is not supported; supported are {known}")
    return CONFIG_SCHEMAS[given]
