"""Llama."""

from __future__ import annotations

from typing import ClassVar

from narrows.arch.configs.gqa import GroupedQuery
from narrows.arch.configs.needs import Flag, Positions
from narrows.arch.model import GQA

__all__ = ["Llama"]


class Llama(GroupedQuery):
    """``LlamaConfig``. ``attention_bias`` is a bias of q, k, v and o."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    class_names: ClassVar[tuple[str, ...]] = ("Llama",)

    max_position_embeddings: Positions = 2048
    attention_bias: Flag = False
    mlp_bias: Flag = False

    def attention(self) -> GQA:
        return self.grouped(qkv_bias=self.attention_bias, o_bias=self.attention_bias)

    def has_mlp_bias(self) -> bool:
        return self.mlp_bias
