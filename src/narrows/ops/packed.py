"""Weights made ready for use: packed once for the CPU's products where those are compiled, else plain tensors.

A weight is filled piece by piece, so that a load never holds one twice.

What int8 means is `int8.py`'s, and what blocks are `blocks.py`'s.

A packed bf16 weight is panels [P, K / 2, 32, 2]: 32 outputs side by side, two neighbouring inputs together
(csrc/kernels/products.h); a packed int8 weight [P, K / 4, 32, 4]; one in blocks [P, B, bytes of 32 blocks]. A
gate-and-up weight has 16 gates and 16 ups in each panel, so that a product leaves both in one place.

Letters: E experts, O outputs, I inputs, F inner columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from narrows.arch.block_formats import BlockFormat
from narrows.ops.blocks import (
    PANEL,
    BlockLinear,
    BlockStack,
    block_kind,
    block_values,
    empty_blocks,
    from_panels,
    into_panels,
)
from narrows.ops.compiled import kernels
from narrows.ops.int8 import (
    MAX_INPUTS,
    Int8Linear,
    Int8Stack,
    Quantization,
    Scales,
    empty_int8,
    quantize_rows,
    weight_values,
)

__all__ = [
    "ExpertStack",
    "Held",
    "LinearParts",
    "LinearWeight",
    "PackedLinear",
    "PackedStack",
    "Room",
    "empty_experts",
    "empty_gate_up",
    "empty_heads",
    "empty_linear",
    "fill",
    "plain",
]

Held = Quantization | BlockFormat
"""What a weight is held as: rounded or not, or in the blocks in which the checkpoint has it."""
Room = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""What gives memory for panels."""


class PackedWeight(ctypes.Structure):
    """``Packed`` of csrc/kernels.h: addresses of panels and scales, and the kind of weight."""

    _fields_ = (("panels", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("kind", ctypes.c_int))


@dataclass(frozen=True, eq=False)
class _Panels:
    """What one packed weight and a stack of them have in common.

    ``gated``: the first half of the outputs are gates, the second ups, and each panel holds some of both. ``int8``: the
    scales, if the panels hold int8. ``blocks``: their format, if they hold blocks.
    """

    panels: Tensor
    num_outputs: int
    num_inputs: int
    gated: bool = False
    int8: Scales | None = None
    blocks: BlockFormat | None = None

    @cached_property
    def given(self) -> tuple[int, int, int | None]:
        """The kind of weight and the addresses of its parts, as compiled functions take them (a stack's: the first)."""
        if self.blocks is not None:
            return block_kind(self.blocks), self.panels.data_ptr(), None
        if self.int8 is None:
            return Quantization.NONE.kind, self.panels.data_ptr(), None
        return self.int8.quantization.kind, self.panels.data_ptr(), self.int8.values.data_ptr()

    @cached_property
    def address(self) -> PackedWeight:
        """The same addresses as a structure, which compiled functions take by reference."""
        kind, panels, scales = self.given
        return PackedWeight(panels, scales, kind)


class PackedLinear(_Panels):
    """A weight [num_outputs, num_inputs] in panels, of bf16, int8 or blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that is packed."""
        return self.num_outputs, self.num_inputs


class PackedStack(_Panels):
    """The same weight of several experts, [E, num_outputs, num_inputs], one after the other."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the weights that are packed."""
        return self.panels.shape[0], self.num_outputs, self.num_inputs

    def __getitem__(self, expert: int) -> PackedLinear:
        scales = None if self.int8 is None else self.int8[expert]
        return PackedLinear(self.panels[expert], self.num_outputs, self.num_inputs, self.gated, scales, self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class LinearParts:
    """The outputs of several weights one after the other, which are not held alike."""

    parts: tuple[OneWeight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of all together."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def at(self) -> Iterator[tuple[int, OneWeight]]:
        """Each with the number of its first output."""
        first = 0
        for part in self.parts:
            yield first, part
            first += part.shape[0]


OneWeight = Tensor | PackedLinear | Int8Linear | BlockLinear
LinearWeight = OneWeight | LinearParts
ExpertStack = Tensor | PackedStack | Int8Stack | BlockStack


def _anywhere(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def empty_linear(
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    held: Held = Quantization.NONE,
    room: Room = _anywhere,
) -> OneWeight:
    """Room for a weight [O, I], to be filled."""
    return _empty(1, num_outputs, num_inputs, dtype, device, held, room)[0]


def empty_gate_up(
    num_inner: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    held: Held = Quantization.NONE,
    room: Room = _anywhere,
    *,
    gated: bool = True,
) -> OneWeight:
    """Room for a weight [2F, I], gates first. ``gated``: packed for silu, which compiled products have in them."""
    return _empty(1, 2 * num_inner, num_inputs, dtype, device, held, room, gated=gated)[0]


def empty_experts(
    num_experts: int,
    num_inner: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    held: tuple[Held, Held] = (Quantization.NONE, Quantization.NONE),
    room: Room = _anywhere,
    *,
    gated: bool = True,
) -> tuple[ExpertStack, ExpertStack]:
    """Room for gate and up [E, 2F, H], gates first, and down [E, H, F], held so. ``gated``: see
    :func:`empty_gate_up`."""
    return (
        _empty(num_experts, 2 * num_inner, hidden, dtype, device, held[0], room, gated=gated),
        _empty(num_experts, hidden, num_inner, dtype, device, held[1], room),
    )


def _empty(
    num_experts: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    held: Held,
    room: Room,
    *,
    gated: bool = False,
) -> ExpertStack:
    """Room for weights [E, O, I]: packed where products of them are compiled."""
    if _packs(dtype, device):
        return _stack(num_experts, num_outputs, num_inputs, gated, held, room)
    if isinstance(held, BlockFormat):
        return empty_blocks(num_experts, num_outputs, num_inputs, device, held)
    if held.kind:
        return empty_int8(num_experts, num_outputs, num_inputs, device, held)
    return torch.empty((num_experts, num_outputs, num_inputs), dtype=dtype, device=device)


def empty_heads(
    num_heads: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    room: Room | None = None,
) -> Tensor | PackedStack:
    """Room for one weight [O, I] per head; ``room``: what gives memory for packed ones."""
    if not _packs(dtype, device):
        return torch.empty((num_heads, num_outputs, num_inputs), dtype=dtype, device=device)
    return _stack(num_heads, num_outputs, num_inputs, False, Quantization.NONE, room or _anywhere)


def fill(weight: LinearWeight, first: int, rows_XI: Tensor) -> None:
    """Outputs first, first + 1, ... of ``weight`` become these rows, rounded to what it holds; of a weight in blocks
    they are its bytes.

    Rows that are both gates and ups, or of two parts, have to come in two calls.
    """
    if isinstance(weight, LinearParts):
        for at, part in weight.at():
            if at <= first < at + part.shape[0]:
                fill(part, first - at, rows_XI)
        return None
    if isinstance(weight, Tensor):
        weight[first : first + rows_XI.shape[0]] = rows_XI
        return None
    if isinstance(weight, Int8Linear | BlockLinear):
        return weight.fill(first, rows_XI)
    num_rows, half = rows_XI.shape[0], -1
    if weight.gated:
        num_inner = weight.num_outputs // 2
        half, first = divmod(first, num_inner) if num_inner else (0, 0)
        assert first + num_rows <= num_inner, "rows that are both gates and ups"
    if weight.blocks is not None:
        return into_panels(weight.panels, _indices(first, num_rows, half), rows_XI, weight.blocks)
    compiled = kernels()
    assert compiled is not None and rows_XI.shape[1] == weight.num_inputs
    pack = compiled.gemm_pack
    if weight.int8 is None:
        rows_XI = rows_XI.to(torch.bfloat16)
    else:
        rows_XI, scales_X = quantize_rows(rows_XI)
        weight.int8.values[_indices(first, num_rows, half)] = scales_X
        pack = compiled.gemm_pack_int8
    if rows_XI.stride(1) != 1:
        rows_XI = rows_XI.contiguous()
    pack(weight.panels.data_ptr(), rows_XI.data_ptr(), rows_XI.stride(0), first, num_rows, weight.num_inputs, half)
    return None


def _indices(first: int, num_rows: int, half: int) -> Tensor:
    """Where outputs stand among those of the panels: in order, or 16 gates and 16 ups in turns."""
    outputs_X = torch.arange(first, first + num_rows)
    if half < 0:
        return outputs_X
    width = PANEL // 2
    return outputs_X // width * PANEL + outputs_X % width + half * width


def plain(weight: LinearWeight) -> Tensor:
    """The weight [O, I] as it was, or as int8 or blocks hold it: for tests and twins."""
    if isinstance(weight, LinearParts):
        return torch.cat([plain(part) for part in weight.parts])
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, Int8Linear):
        return weight_values(weight)
    if isinstance(weight, BlockLinear):
        return block_values(weight.bytes_ON, weight.blocks)
    if weight.blocks is not None:
        values = torch.unflatten(block_values(from_panels(weight.panels, weight.blocks), weight.blocks), 0, (-1, PANEL))
    else:
        values = weight.panels.transpose(1, 2).flatten(2)[..., : weight.num_inputs]  # [P, 32, I]
    if weight.int8 is not None:  # 128 is added there
        values = (values.float() - 128) * weight.int8.values.view(-1, PANEL, 1)
    if not weight.gated:
        return values.flatten(0, 1)[: weight.num_outputs].clone()
    gates, ups = torch.unflatten(values, 1, (2, PANEL // 2)).unbind(1)
    num_inner = weight.num_outputs // 2
    return torch.cat([half.flatten(0, 1)[:num_inner] for half in (gates, ups)])


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu" and kernels() is not None


def _stack(num_experts: int, num_outputs: int, num_inputs: int, gated: bool, held: Held, room: Room) -> PackedStack:
    """Room for panels; what lies beyond the weight is 0 (of int8 anything: rows have zeros there, scales are 0)."""
    num_panels = -(-num_outputs // PANEL)
    scales, blocks = None, None
    if isinstance(held, BlockFormat):
        blocks, num_blocks = held, num_inputs // held.columns
        assert num_blocks * held.columns == num_inputs, f"{num_inputs} inputs in blocks of {held.columns}"
        panels = room((num_experts, num_panels, num_blocks, PANEL * held.nbytes), torch.uint8)
    else:
        assert num_inputs <= MAX_INPUTS or not held.kind, f"{num_inputs} inputs: their products may not fit 32 bits"
        together, dtype = (4, torch.uint8) if held.kind else (2, torch.bfloat16)
        panels = room((num_experts, num_panels, -(-num_inputs // together), PANEL, together), dtype)
        scales = Scales.empty(num_experts, num_panels * PANEL, held) if held.kind else None
    if num_outputs % PANEL:
        panels[:, -1] = 0
    return PackedStack(panels, num_outputs, num_inputs, gated, scales, blocks)
