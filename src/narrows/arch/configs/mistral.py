"""Mistral: Llama without biases, and a window in every layer unless the file says null."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from narrows.arch.configs.gqa import PLAIN_HALVES, GroupedQuery
from narrows.arch.configs.needs import Heads, Positions
from narrows.arch.configs.schema import Only
from narrows.arch.model import GQA

__all__ = ["Mistral"]

_NO_BIAS = Only(False, "Mistral's projections have no bias")


class Mistral(GroupedQuery):
    """``MistralConfig``."""

    model_types: ClassVar[tuple[str, ...]] = ("mistral",)
    class_names: ClassVar[tuple[str, ...]] = ("Mistral",)
    only: ClassVar[Mapping[str, Only]] = MappingProxyType(
        {**PLAIN_HALVES, "attention_bias": _NO_BIAS, "mlp_bias": _NO_BIAS}
    )

    num_key_value_heads: Heads = 8
    max_position_embeddings: Positions = 131072
    sliding_window: Positions | None = 4096

    def attention(self) -> GQA:
        return self.grouped(window=self.sliding_window, sliding=range(self.num_hidden_layers))
