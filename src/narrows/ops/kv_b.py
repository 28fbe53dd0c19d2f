"""The checkpoint's ``kv_b_proj`` as latent attention multiplies with it: keys' and values' halves, per head.

Letters: N heads held here, D query/key columns without rotation, R kv_lora_rank, V value columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.ops.packed import PackedStack, Room, empty_heads, fill, plain

__all__ = ["KeyWeight", "PackedKeys", "ValueWeight", "plain_halves", "split_kv_b"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedKeys:
    """w_uk [N, D, R] packed twice: ``expand`` takes latents to keys, ``absorb`` (its transpose) queries to latents."""

    expand: PackedStack
    absorb: PackedStack

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of w_uk."""
        return self.expand.shape


KeyWeight = Tensor | PackedKeys
ValueWeight = Tensor | PackedStack


def split_kv_b(kv_b_NXR: Tensor, key_dim: int, room: Room | None = None) -> tuple[KeyWeight, ValueWeight]:
    """w_uk [N, D, R] and w_uv [N, V, R] of ``kv_b_proj`` [N, D + V, R], ready for ``mla_attention``.

    ``room``: what gives memory for packed ones.
    """
    w_uk_NDR, w_uv_NVR = kv_b_NXR.tensor_split((key_dim,), dim=1)
    expand, values = _heads(w_uk_NDR, room), _heads(w_uv_NVR, room)
    if isinstance(expand, Tensor):
        return expand, values
    absorb = _heads(w_uk_NDR.transpose(1, 2), room)
    assert isinstance(absorb, PackedStack)
    return PackedKeys(expand, absorb), values


def plain_halves(w_uk: KeyWeight, w_uv: ValueWeight) -> tuple[Tensor, Tensor]:
    """The weights as they were, [N, D, R] and [N, V, R]: for twins and tests."""
    return (_plain(w_uk.expand) if isinstance(w_uk, PackedKeys) else w_uk), _plain(w_uv)


def _heads(weight_NOI: Tensor, room: Room | None) -> Tensor | PackedStack:
    num_heads, num_outputs, num_inputs = weight_NOI.shape
    ready = empty_heads(num_heads, num_outputs, num_inputs, weight_NOI.dtype, weight_NOI.device, room)
    if isinstance(ready, Tensor):
        return ready.copy_(weight_NOI)
    for head in range(weight_NOI.shape[0]):
        fill(ready[head], 0, weight_NOI[head])
    return ready


def _plain(weight: ValueWeight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    num_heads, *shape = weight.shape
    heads = [plain(weight[head]) for head in range(num_heads)]
    return torch.stack(heads) if heads else weight.panels.new_empty((0, *shape))
