"""Seeded random weights (``--load-format dummy``): the same tensor on every rank, so sharded equals whole.

Norm weights are near 1, others normal with a standard deviation that keeps activations of order one through many
layers.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from narrows.arch.weights import Weight

__all__ = ["DummyWeights", "block_span", "random_blocks"]


def random_blocks(weight: Weight, generator: torch.Generator) -> Tensor:
    """Random blocks of all of a matrix, [rows, bytes], whose numbers are about as large as weights."""
    assert weight.blocks is not None
    rows, columns = weight.shape
    num_blocks = columns // weight.blocks.columns
    found = torch.randint(256, (rows, num_blocks, weight.blocks.nbytes), generator=generator, dtype=torch.uint8)
    # Codes and the scales within a block are whole numbers, together below 2^11.
    size = torch.tensor([columns**-0.5 * 2**-11 if weight.blocks.columns == 256 else columns**-0.5 * 2**-5])
    for start, length, unit in weight.blocks.parts:
        if unit == length:  # a scale of all, as float16
            found[..., start : start + length] = size.half().view(torch.uint8)
    return found.flatten(1)


def block_span(bytes_ON: Tensor, weight: Weight, span: tuple[int, int] | None) -> Tensor:
    """Of all of a matrix's blocks, those of a span of its rows or columns."""
    if span is None:
        return bytes_ON
    if (weight.dim or 0) == 0:
        return bytes_ON[span[0] : span[1]]
    assert weight.blocks is not None
    return bytes_ON[:, weight.blocks.row_bytes(span[0]) : weight.blocks.row_bytes(span[1])]


class DummyWeights:
    """Random tensors drawn from a generator seeded by the tensor's name."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.seed, self.dtype = seed, dtype

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        name, generator = self._drawn(weight, expert)
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

    def take_blocks(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """Random blocks."""
        return block_span(random_blocks(weight, self._drawn(weight, expert)[1]), weight, span)

    def _drawn(self, weight: Weight, expert: int | None) -> tuple[str, torch.Generator]:
        """The tensor's name, and what its numbers are drawn by."""
        name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
        # torch's CPU generator looks at the low 32 bits of its seed only, so both numbers go into those.
        return name, torch.Generator().manual_seed(zlib.crc32(name.encode(), self.seed))
