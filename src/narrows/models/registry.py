"""Which class computes which family. A dictionary is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from narrows.arch.config import ModelConfig
from narrows.errors import ConfigError
from narrows.models.decoder import Decoder, Loader, RankContext
from narrows.models.deepseek import Deepseek
from narrows.models.llama import Llama
from narrows.models.llama_moe import LlamaMoe
from narrows.weights.source import WeightSource

__all__ = ["EXECUTABLE", "build_model", "check_executable"]

EXECUTABLE: Mapping[str, Callable[[ModelConfig, Loader], Decoder]] = MappingProxyType(
    {
        "deepseek_v2": Deepseek,
        "deepseek_v3": Deepseek,
        "llama": Llama,
        "mistral": Llama,
        "qwen2": Llama,
        "qwen3": Llama,
        "qwen3_moe": LlamaMoe,
        "glm4_moe": LlamaMoe,
    }
)


def check_executable(config: ModelConfig) -> None:
    """Refuse a family that can be planned but not run.

    Raises:
        ConfigError: naming the families that run.
    """
    if config.model_type not in EXECUTABLE:
        raise ConfigError(
            f"{config.name}: {config.model_type} can be planned but not yet run; families that run: "
            f"{', '.join(EXECUTABLE)}"
        )


def build_model(config: ModelConfig, source: WeightSource, rank_context: RankContext) -> Decoder:
    """The model of ``config`` on one rank, its weights taken from ``source``.

    Raises:
        ConfigError: the family cannot be run.
        CheckpointError: a tensor is missing or has another shape.
    """
    check_executable(config)
    return EXECUTABLE[config.model_type](config, Loader(source, rank_context, config.hidden_act))
