"""Weights made ready for use: packed once for the CPU's bf16 products where those are compiled, else plain tensors.

Knows how a weight is laid out, and fills it piece by piece, so that a load never holds a weight twice. Does not know
what reads it (`linear`, `mlp`, `experts_mlp`), nor whose weight it is.

A packed weight is panels [P, K / 2, 32, 2]: 32 outputs side by side, two neighbouring inputs together (native/csrc/
gemm.h). A gate-and-up weight has 16 gates and 16 ups in each panel, so that a product leaves both in one place.

Letters: E experts, O outputs, I inputs, F inner columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.ops.compiled import gemm_library

__all__ = [
    "ExpertStack",
    "LinearWeight",
    "PackedLinear",
    "PackedStack",
    "empty_experts",
    "empty_gate_up",
    "empty_heads",
    "empty_linear",
    "fill",
    "plain",
]

PANEL = 32


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A bf16 weight [num_outputs, num_inputs] in panels. ``gated``: the first half of the outputs are gates, the second
    ups, and each panel holds some of both."""

    panels: Tensor
    num_outputs: int
    num_inputs: int
    gated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that is packed."""
        return self.num_outputs, self.num_inputs


@dataclass(frozen=True, slots=True, eq=False)
class PackedStack:
    """The same weight of several experts, [E, num_outputs, num_inputs], one after the other."""

    panels: Tensor
    num_outputs: int
    num_inputs: int
    gated: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the weights that are packed."""
        return self.panels.shape[0], self.num_outputs, self.num_inputs

    def __getitem__(self, expert: int) -> PackedLinear:
        return PackedLinear(self.panels[expert], self.num_outputs, self.num_inputs, self.gated)


LinearWeight = Tensor | PackedLinear
ExpertStack = Tensor | PackedStack


def empty_linear(num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> LinearWeight:
    """Room for a weight [O, I], to be filled."""
    if not _packs(dtype, device):
        return torch.empty((num_outputs, num_inputs), dtype=dtype, device=device)
    return PackedLinear(_panels(1, num_outputs, num_inputs, False)[0], num_outputs, num_inputs)


def empty_gate_up(num_inner: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> LinearWeight:
    """Room for a weight [2F, I], gates first."""
    if not _packs(dtype, device):
        return torch.empty((2 * num_inner, num_inputs), dtype=dtype, device=device)
    return PackedLinear(_panels(1, 2 * num_inner, num_inputs, True)[0], 2 * num_inner, num_inputs, True)


def empty_experts(
    num_experts: int, num_inner: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[ExpertStack, ExpertStack]:
    """Room for gate and up [E, 2F, H], gates first, and down [E, H, F]."""
    if not _packs(dtype, device):
        return (
            torch.empty((num_experts, 2 * num_inner, hidden), dtype=dtype, device=device),
            torch.empty((num_experts, hidden, num_inner), dtype=dtype, device=device),
        )
    return (
        PackedStack(_panels(num_experts, 2 * num_inner, hidden, True), 2 * num_inner, hidden, True),
        PackedStack(_panels(num_experts, hidden, num_inner, False), hidden, num_inner),
    )


def empty_heads(
    num_heads: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device
) -> ExpertStack:
    """Room for one weight [O, I] per head."""
    if not _packs(dtype, device):
        return torch.empty((num_heads, num_outputs, num_inputs), dtype=dtype, device=device)
    return PackedStack(_panels(num_heads, num_outputs, num_inputs, False), num_outputs, num_inputs)


def fill(weight: LinearWeight, first: int, rows_XI: Tensor) -> None:
    """Outputs first, first + 1, ... of ``weight`` become these rows, rounded to its dtype.

    Rows that are both gates and ups have to come in two calls.
    """
    if isinstance(weight, Tensor):
        weight[first : first + rows_XI.shape[0]] = rows_XI
        return
    library = gemm_library()
    assert library is not None and rows_XI.shape[1] == weight.num_inputs
    rows_XI = rows_XI.to(torch.bfloat16)
    if rows_XI.stride(1) != 1:
        rows_XI = rows_XI.contiguous()
    num_rows, half = rows_XI.shape[0], -1
    if weight.gated:
        num_inner = weight.num_outputs // 2
        half, first = divmod(first, num_inner) if num_inner else (0, 0)
        assert first + num_rows <= num_inner, "rows that are both gates and ups"
    library.narrows_gemm_pack(
        weight.panels.data_ptr(), rows_XI.data_ptr(), rows_XI.stride(0), first, num_rows, weight.num_inputs, half
    )


def plain(weight: LinearWeight) -> Tensor:
    """The weight [O, I] as it was: for tests and twins."""
    if isinstance(weight, Tensor):
        return weight
    values = weight.panels.transpose(1, 2).flatten(2)[..., : weight.num_inputs]  # [P, 32, I]
    if not weight.gated:
        return values.flatten(0, 1)[: weight.num_outputs].clone()
    gates, ups = values.unflatten(1, (2, PANEL // 2)).unbind(1)
    num_inner = weight.num_outputs // 2
    return torch.cat([half.flatten(0, 1)[:num_inner] for half in (gates, ups)])


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu" and gemm_library() is not None


def _panels(num_experts: int, num_outputs: int, num_inputs: int, gated: bool) -> Tensor:
    """Room for panels; what lies beyond the weight is 0."""
    num_panels = -(-num_outputs // PANEL)
    panels = torch.empty((num_experts, num_panels, (num_inputs + 1) // 2, PANEL, 2), dtype=torch.bfloat16)
    if num_outputs % PANEL:
        panels[:, -1] = 0
    return panels
