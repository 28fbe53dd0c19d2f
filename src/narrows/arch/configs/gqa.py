"""What families with grouped-query attention share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar

from narrows.arch.configs.needs import Heads, Width
from narrows.arch.configs.rope import Head
from narrows.arch.configs.schema import Only, Schema
from narrows.arch.model import GQA, MoE
from narrows.errors import CheckpointError

__all__ = ["PLAIN_HALVES", "GroupedQuery"]

PLAIN_HALVES: Mapping[str, Only] = MappingProxyType(
    dict.fromkeys(("rope_interleave", "rope_interleaved"), Only(False, "this family rotates halves of a head"))
)


class GroupedQuery(Schema):
    """A decoder with grouped-query attention; a dense MLP unless the family adds experts."""

    only: ClassVar[Mapping[str, Only]] = PLAIN_HALVES

    intermediate_size: Width
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None

    def dense_size(self, moe: MoE | None) -> int:
        return self.intermediate_size

    def head(self) -> Head:
        return Head(head_dim=self.columns(), max_position_embeddings=self.max_position_embeddings)

    def columns(self) -> int:
        """``head_dim``, which is an even share of ``hidden_size`` where the file does not say."""
        heads = self.num_attention_heads
        if self.head_dim is not None:
            return self.head_dim
        if self.hidden_size % heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} does not divide into {heads} attention heads; head_dim is needed"
            )
        return self.hidden_size // heads

    def grouped(
        self,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        window: int | None = None,
        sliding: Iterable[int] = (),
    ) -> GQA:
        """Attention with the family's biases, norms and windows."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            default = "" if "num_key_value_heads" in self.model_fields_set else ", the family's default"
            raise CheckpointError(
                f"{heads} attention heads do not divide into groups for num_key_value_heads {kv_heads}{default}"
            )
        layers = frozenset(sliding) if window is not None else frozenset()
        return GQA(
            num_key_value_heads=kv_heads,
            head_dim=self.columns(),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            sliding_window=window if layers else None,
            sliding_layers=layers,
        )
