"""Weights in blocks as a checkpoint stores them (Q4_K and so on): what their bytes mean, in plain torch.

The compiled products (csrc/tile/blocks.h, behind `linear`, `mlp` and `experts_mlp`) compute the same; these are their
twins, and what runs where they are not compiled.

A weight is ``scale * code - min``, with a scale and a min for 16 or 32 inputs. Rows are rounded to int8 as they come,
32 inputs with a scale of their own (their largest magnitude / 127): no calibration, and no row's numbers depend on
another's.
Source: ``dequantize_row_*`` of ggml-quants.c; its products round rows likewise (``block_q8_0``, ``block_q8_K``, the
latter with one scale for 256).

Letters: T rows, E experts, O outputs, I inputs, X some outputs, B blocks of an output, N bytes of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from narrows.arch.block_formats import BLOCK_FORMATS, BlockFormat
from narrows.ops.int8 import Quantization

__all__ = [
    "GROUP",
    "PANEL",
    "BlockLinear",
    "BlockStack",
    "block_kind",
    "block_linear",
    "block_values",
    "empty_blocks",
    "from_panels",
    "into_panels",
    "round_groups",
]

GROUP = 32
"""Inputs of a row that share a scale."""

PANEL = 32
"""Outputs that a panel of compiled products holds (csrc/tile/panels.h)."""


def block_kind(blocks: BlockFormat) -> int:
    """The ``Kind`` of csrc/kernels.h."""
    return Quantization.INT8_WEIGHT_ONLY.kind + 1 + BLOCK_FORMATS.index(blocks)


def _half(block: Tensor, at: int) -> Tensor:
    """A float16 of each block, [..., 1]."""
    return block[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Of each run of bytes first the lower halves, then the upper ones."""
    runs = torch.unflatten(codes, -1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and mins in 12 bytes."""
    low, middle, high = torch.split(packed, 4, dim=-1)
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=-1)
    mins = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=-1)
    return scales, mins


def _scaled(codes: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    """``scale * code - min``, with a scale and a min for as many codes each as there are of both."""
    grouped = torch.unflatten(codes.float(), -1, (scales.shape[-1], -1))
    return (grouped * scales.unsqueeze(-1) - mins.unsqueeze(-1)).flatten(-2)


def _q4_0(block: Tensor) -> Tensor:
    return (_nibbles(block[..., 2:], 16).float() - 8) * _half(block, 0)


def _q8_0(block: Tensor) -> Tensor:
    return block[..., 2:].view(torch.int8).float() * _half(block, 0)


def _of_six_bits(block: Tensor, codes: Tensor) -> Tensor:
    scales, mins = _six_bits(block[..., 4:16])
    return _scaled(codes, scales.float() * _half(block, 0), mins.float() * _half(block, 2))


def _q4_k(block: Tensor) -> Tensor:
    return _of_six_bits(block, _nibbles(block[..., 16:], 32))


def _q5_k(block: Tensor) -> Tensor:
    fifth = torch.stack([block[..., 16:48] >> group & 1 for group in range(8)], dim=-2).flatten(-2)
    return _of_six_bits(block, _nibbles(block[..., 48:], 32) | fifth << 4)


def _q6_k(block: Tensor) -> Tensor:
    low = torch.cat([_nibbles(half, 64) for half in torch.split(block[..., :128], 64, dim=-1)], dim=-1)
    high = [half >> shift & 3 for half in torch.split(block[..., 128:192], 32, dim=-1) for shift in (0, 2, 4, 6)]
    codes = (low | torch.cat(high, dim=-1) << 4).float() - 32
    scales = block[..., 192:208].contiguous().view(torch.int8).float() * _half(block, 208)
    return _scaled(codes, scales, torch.zeros_like(scales))


_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
)


def block_values(bytes_XN: Tensor, blocks: BlockFormat) -> Tensor:
    """The numbers that outputs' blocks [X, N] stand for, [X, I] float32."""
    return _VALUES[blocks.name](torch.unflatten(bytes_XN, -1, (-1, blocks.nbytes))).flatten(-2)


def into_panels(panels_PBN: Tensor, outputs_X: Tensor, bytes_XN: Tensor, blocks: BlockFormat) -> None:
    """Blocks [X, N] become those of ``outputs`` in panels [P, B, bytes of a panel's blocks]."""
    block_XBN = torch.unflatten(bytes_XN, -1, (-1, blocks.nbytes))
    for held, (start, size, unit) in zip(_held(panels_PBN, blocks), blocks.parts, strict=True):
        held[outputs_X // PANEL, :, :, outputs_X % PANEL] = torch.unflatten(
            block_XBN[..., start : start + size], -1, (-1, unit)
        )


def from_panels(panels_PBN: Tensor, blocks: BlockFormat) -> Tensor:
    """All outputs' blocks of panels, [32 P, N], those beyond the weight too."""
    num_panels, num_blocks = panels_PBN.shape[:2]
    block_PLBN = panels_PBN.new_empty((num_panels, PANEL, num_blocks, blocks.nbytes))
    for held, (start, size, _) in zip(_held(panels_PBN, blocks), blocks.parts, strict=True):
        block_PLBN[..., start : start + size] = held.permute(0, 3, 1, 2, 4).flatten(-2)
    return block_PLBN.flatten(2).flatten(0, 1)


def _held(panels_PBN: Tensor, blocks: BlockFormat) -> list[Tensor]:
    """Views of panels, one for each part of a block: [P, B, units, 32, bytes of a unit]."""
    parts = torch.split(panels_PBN, [PANEL * size for _, size, _ in blocks.parts], dim=-1)
    return [
        torch.unflatten(part, -1, (-1, PANEL, unit)) for part, (_, _, unit) in zip(parts, blocks.parts, strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class BlockLinear:
    """A weight [O, I] as its blocks' bytes [O, N]."""

    bytes_ON: Tensor
    blocks: BlockFormat

    @property
    def shape(self) -> torch.Size:
        num_outputs, num_bytes = self.bytes_ON.shape
        return torch.Size((num_outputs, num_bytes // self.blocks.nbytes * self.blocks.columns))

    def fill(self, first: int, bytes_XN: Tensor) -> None:
        """Outputs first, first + 1, ... become these."""
        self.bytes_ON[first : first + bytes_XN.shape[0]] = bytes_XN


@dataclass(frozen=True, slots=True, eq=False)
class BlockStack:
    """The same weight of several experts, [E, O, N]."""

    bytes_EON: Tensor
    blocks: BlockFormat

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.bytes_EON.shape[0], *self[0].shape))

    def __getitem__(self, expert: int) -> BlockLinear:
        return BlockLinear(self.bytes_EON[expert], self.blocks)


def empty_blocks(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device, blocks: BlockFormat
) -> BlockStack:
    """Room for weights [E, O, I], to be filled."""
    shape = (num_experts, num_outputs, blocks.row_bytes(num_inputs))
    return BlockStack(torch.empty(shape, dtype=torch.uint8, device=device), blocks)


def round_groups(x_TI: Tensor) -> Tensor:
    """Rows as products take them: each group of 32 numbers rounded to int8 and back, in float32."""
    groups_TGX = torch.unflatten(x_TI.float(), -1, (-1, GROUP))
    largest_TG1 = groups_TGX.abs().amax(dim=-1, keepdim=True)
    inverse_TG1 = torch.where(largest_TG1 > 1e-35, torch.full_like(largest_TG1, 127.0) / largest_TG1, 0.0)
    return ((groups_TGX * inverse_TG1).round_() * (largest_TG1 / 127.0)).flatten(-2)


def block_linear(x_TI: Tensor, weight: BlockLinear, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` in x's dtype, of rounded rows, summed in float32, rounded once."""
    y_TO = round_groups(x_TI) @ block_values(weight.bytes_ON, weight.blocks).t()
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)
