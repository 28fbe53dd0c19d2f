"""Random weights in blocks, and what the gguf package says that they are."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from narrows.arch.block_formats import BlockFormat

SIZES = {"Q4_0": 0.02, "Q8_0": 0.001, "Q4_K": 0.0003, "Q5_K": 0.0002, "Q6_K": 0.00005}
"""Of a block's scales, so that values are about as large as weights."""


def random_blocks(blocks: BlockFormat, num_outputs: int, num_inputs: int, *, seed: int = 0, size: float = 1) -> Tensor:
    """Outputs' blocks [O, N]: random bytes with scales about ``size`` times as large as usual."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (num_outputs, num_inputs // blocks.columns, blocks.nbytes), np.uint8)
    for start, length, unit in blocks.parts:
        if unit == 2:
            scales = rng.uniform(0.5, 1.0, found.shape[:2]) * SIZES[blocks.name] * size
            scales = (scales * rng.choice([-1, 1], found.shape[:2])).astype(np.float16)
            found[..., start : start + length] = scales[..., None].view(np.uint8)
    return torch.from_numpy(found.reshape(num_outputs, -1))


def reference(bytes_ON: Tensor, blocks: BlockFormat) -> Tensor:
    """The numbers of outputs' blocks [O, I] float32, by the gguf package."""
    return torch.from_numpy(quants.dequantize(bytes_ON.numpy(), GGMLQuantizationType(blocks.encoding)))
