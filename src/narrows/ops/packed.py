"""Weights made ready for use: packed once for the CPU's products where those are compiled, else plain tensors.

A weight is filled piece by piece, so that a load never holds one twice.

What int8 means is `int8.py`'s.

A packed bf16 weight is panels [P, K / 2, 32, 2]: 32 outputs side by side, two neighbouring inputs together
(csrc/kernels/products.h); a packed int8 weight [P, K / 4, 32, 4]. A gate-and-up weight has 16 gates and 16 ups
in each panel, so that a product leaves both in one place.

Letters: E experts, O outputs, I inputs, F inner columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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

PANEL = 32

Room = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""What gives memory for panels."""


class PackedWeight(ctypes.Structure):
    """``Packed`` of csrc/kernels.h: addresses of panels and scales."""

    _fields_ = (("panels", ctypes.c_void_p), ("scales", ctypes.c_void_p))


@dataclass(frozen=True, eq=False)
class _Panels:
    """What one packed weight and a stack of them have in common.

    ``gated``: the first half of the outputs are gates, the second ups, and each panel holds some of both. ``int8``: the
    scales, if the panels hold int8.
    """

    panels: Tensor
    num_outputs: int
    num_inputs: int
    gated: bool = False
    int8: Scales | None = None

    @cached_property
    def given(self) -> tuple[int, int, int | None]:
        """The kind of weight and the addresses of its parts, as compiled functions take them (a stack's: the first)."""
        if self.int8 is None:
            return Quantization.NONE.kind, self.panels.data_ptr(), None
        return self.int8.quantization.kind, self.panels.data_ptr(), self.int8.values.data_ptr()

    @cached_property
    def address(self) -> PackedWeight:
        """The same addresses as a structure, which compiled functions take by reference."""
        return PackedWeight(*self.given[1:])


class PackedLinear(_Panels):
    """A weight [num_outputs, num_inputs] in panels, of bf16 or int8."""

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
        return PackedLinear(self.panels[expert], self.num_outputs, self.num_inputs, self.gated, scales)


LinearWeight = Tensor | PackedLinear | Int8Linear
ExpertStack = Tensor | PackedStack | Int8Stack


def _anywhere(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def empty_linear(
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    room: Room = _anywhere,
) -> LinearWeight:
    """Room for a weight [O, I], to be filled."""
    if _packs(dtype, device):
        return _stack(1, num_outputs, num_inputs, False, quantization, room)[0]
    if quantization.kind:
        return empty_int8(1, num_outputs, num_inputs, device, quantization)[0]
    return torch.empty((num_outputs, num_inputs), dtype=dtype, device=device)


def empty_gate_up(
    num_inner: int,
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    room: Room = _anywhere,
    *,
    gated: bool = True,
) -> LinearWeight:
    """Room for a weight [2F, I], gates first. ``gated``: packed for silu, which compiled products have in them."""
    if not gated or not _packs(dtype, device):
        return empty_linear(2 * num_inner, num_inputs, dtype, device, quantization, room)
    return _stack(1, 2 * num_inner, num_inputs, True, quantization, room)[0]


def empty_experts(
    num_experts: int,
    num_inner: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    room: Room = _anywhere,
    *,
    gated: bool = True,
) -> tuple[ExpertStack, ExpertStack]:
    """Room for gate and up [E, 2F, H], gates first, and down [E, H, F]. ``gated``: see :func:`empty_gate_up`."""
    if _packs(dtype, device):
        return (
            _stack(num_experts, 2 * num_inner, hidden, gated, quantization, room),
            _stack(num_experts, hidden, num_inner, False, quantization, room),
        )
    if quantization.kind:
        return (
            empty_int8(num_experts, 2 * num_inner, hidden, device, quantization),
            empty_int8(num_experts, hidden, num_inner, device, quantization),
        )
    return (
        torch.empty((num_experts, 2 * num_inner, hidden), dtype=dtype, device=device),
        torch.empty((num_experts, hidden, num_inner), dtype=dtype, device=device),
    )


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
    """Outputs first, first + 1, ... of ``weight`` become these rows, rounded to what it holds.

    Rows that are both gates and ups have to come in two calls.
    """
    if isinstance(weight, Tensor):
        weight[first : first + rows_XI.shape[0]] = rows_XI
        return
    if isinstance(weight, Int8Linear):
        weight.fill(first, rows_XI)
        return
    compiled = kernels()
    assert compiled is not None and rows_XI.shape[1] == weight.num_inputs
    num_rows, half = rows_XI.shape[0], -1
    if weight.gated:
        num_inner = weight.num_outputs // 2
        half, first = divmod(first, num_inner) if num_inner else (0, 0)
        assert first + num_rows <= num_inner, "rows that are both gates and ups"
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


def _indices(first: int, num_rows: int, half: int) -> Tensor:
    """Where outputs stand among those of the panels: in order, or 16 gates and 16 ups in turns."""
    outputs_X = torch.arange(first, first + num_rows)
    if half < 0:
        return outputs_X
    width = PANEL // 2
    return outputs_X // width * PANEL + outputs_X % width + half * width


def plain(weight: LinearWeight) -> Tensor:
    """The weight [O, I] as it was, or as int8 holds it: for tests and twins."""
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, Int8Linear):
        return weight_values(weight)
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


def _stack(
    num_experts: int, num_outputs: int, num_inputs: int, gated: bool, quantization: Quantization, room: Room
) -> PackedStack:
    """Room for panels; what lies beyond the weight is 0 (of int8 anything: rows have zeros there, scales are 0)."""
    assert num_inputs <= MAX_INPUTS or not quantization.kind, f"{num_inputs} inputs: their products may not fit 32 bits"
    num_panels = -(-num_outputs // PANEL)
    together, dtype = (4, torch.uint8) if quantization.kind else (2, torch.bfloat16)
    shape = (num_experts, num_panels, -(-num_inputs // together), PANEL, together)
    panels = room(shape, dtype)
    if num_outputs % PANEL:
        panels[:, -1] = 0
    scales = Scales.empty(num_experts, num_panels * PANEL, quantization) if quantization.kind else None
    return PackedStack(panels, num_outputs, num_inputs, gated, scales)
