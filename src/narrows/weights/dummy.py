"""Seeded random weights (``--load-format dummy``): the same tensor on every rank, so sharded equals whole.

Norm weights are near 1, others normal with a standard deviation that keeps activations of order one through many
layers.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from narrows.arch.weights import Weight

__all__ = ["DummyWeights"]


class DummyWeights:
    """Random tensors drawn from a generator seeded by the tensor's name."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.seed, self.dtype = seed, dtype

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        # torch's CPU generator looks at the low 32 bits of its seed only, so both numbers go into those.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), self.seed))
        values = torch.randn(weight.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            values *= 0.1
        elif len(weight.shape) == 1:
            values = 1 + 0.1 * values if "norm" in name else 0.02 * values
        else:
            values *= weight.shape[1] ** -0.5
        values = values.to(self.dtype)
        if span is None:
            return values
        return values.narrow(weight.dim or 0, span[0], span[1] - span[0]).contiguous()
