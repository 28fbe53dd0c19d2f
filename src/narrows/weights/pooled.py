"""Random weights cut from one pool of numbers: as good as any where only time counts, and there at once.

Gates and biases spread rows over experts as those of `dummy.py` do, since the time of experts depends on how many are
hit.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from narrows.arch.weights import Weight
from narrows.weights.dummy import block_span, random_blocks

__all__ = ["PooledWeights"]

_POOL = 1 << 20


class PooledWeights:
    """A :class:`~narrows.weights.source.WeightSource` of repeated random numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).to(dtype)

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """A tensor of the weight's shape, or of this rank's slice of it."""
        shape = list(weight.shape)
        if span is not None:
            shape[weight.dim or 0] = span[1] - span[0]
        name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        if len(weight.shape) == 1:
            scale, middle = (0.1, 1.0) if "norm" in name else (0.02, 0.0)
        else:
            scale, middle = weight.shape[1] ** -0.5, 0.0
        num, first = prod(shape), zlib.crc32(name.encode()) % (_POOL // 2)
        pool = self._pool[first:]
        return pool.repeat(-(-num // pool.numel()))[:num].mul_(scale).add_(middle).reshape(shape)

    def take_blocks(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """Random blocks, of one row as of the next."""
        line = random_blocks(replace(weight, shape=(1, weight.shape[1])), torch.Generator().manual_seed(0))
        return block_span(line.expand(weight.shape[0], -1), weight, span)
