"""Weights of int8 with a scale per output, and rows of int8 with a scale per row: what they are, in plain torch.

The compiled products (csrc/kernels/products.h, behind `linear`, `mlp` and `experts_mlp`) compute
the same; these are their twins, and what runs where they are not compiled.

A weight's output o is rounded to ``round(w[o] * 127 / max |w[o]|)``, its scale is ``max |w[o]| / 127``: symmetric, of
the inputs that this rank holds. Rows likewise, as they come, each on its own: no calibration, and no row's numbers
depend on another's. Products of int8 rows are exact integers until they are scaled.
Source: the dynamic and weight-only int8 schemes of torchao (``int8_dynamic_activation_int8_weight``,
``int8_weight_only``), LLM.int8() (Dettmers et al., 2022) for vector-wise scales.

Letters: T rows, E experts, O outputs, I inputs, X some outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = [
    "Int8Linear",
    "Int8Stack",
    "Quantization",
    "Scales",
    "empty_int8",
    "int8_linear",
    "quantize_rows",
    "weight_values",
]

MAX_INPUTS = 1 << 16
"""Inputs whose products surely fit 32 bits: 255 * 127 each."""


class Quantization(Enum):
    """What linear weights are held as. The number is the ``Kind`` of csrc/kernels.h, less for `STORED`: there each
    weight has the kind of its own blocks (`blocks.py`)."""

    NONE = "none"
    INT8 = "int8"
    """Weights and rows of int8."""
    INT8_WEIGHT_ONLY = "int8-weight-only"
    STORED = "stored"
    """As the checkpoint stores them, where that is in blocks that kernels multiply; else not quantised."""

    @property
    def kind(self) -> int:
        return list(Quantization).index(self)


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 [T, I] and float32 scales [T]; a row of zeros has scale 0."""
    wide_TI = x_TI.float()
    largest_T = wide_TI.abs().amax(dim=1) if x_TI.shape[1] else wide_TI.new_zeros(x_TI.shape[0])
    # Of a Python number over a tensor torch makes a reciprocal and a product, which is another rounding.
    inverse_T = torch.where(largest_T > 0, torch.full_like(largest_T, 127.0) / largest_T, 0.0)
    return (wide_TI * inverse_T.unsqueeze(1)).round_().clamp_(-128, 127).to(torch.int8), largest_T / 127.0


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """What a packed int8 weight has beside its panels: each output's scale, for whole panels, [..., O]."""

    values: Tensor
    quantization: Quantization

    @classmethod
    def empty(cls, num_experts: int, num_outputs: int, quantization: Quantization) -> Scales:
        return cls(torch.zeros((num_experts, num_outputs)), quantization)

    def __getitem__(self, expert: int) -> Scales:
        return Scales(self.values[expert], self.quantization)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Linear:
    """A weight [O, I] of int8 as a plain tensor, with its scales [O]."""

    values_OI: Tensor
    scales_O: Tensor
    quantization: Quantization

    @property
    def shape(self) -> torch.Size:
        return self.values_OI.shape

    def fill(self, first: int, rows_XI: Tensor) -> None:
        """Outputs first, first + 1, ... become these rows."""
        stop = first + rows_XI.shape[0]
        self.values_OI[first:stop], self.scales_O[first:stop] = quantize_rows(rows_XI)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Stack:
    """The same weight of several experts, [E, O, I]."""

    values_EOI: Tensor
    scales_EO: Tensor
    quantization: Quantization

    @property
    def shape(self) -> torch.Size:
        return self.values_EOI.shape

    def __getitem__(self, expert: int) -> Int8Linear:
        return Int8Linear(self.values_EOI[expert], self.scales_EO[expert], self.quantization)


def empty_int8(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device, quantization: Quantization
) -> Int8Stack:
    """Room for weights [E, O, I], to be filled."""
    values_EOI = torch.empty((num_experts, num_outputs, num_inputs), dtype=torch.int8, device=device)
    scales_EO = torch.empty((num_experts, num_outputs), dtype=torch.float32, device=device)
    return Int8Stack(values_EOI, scales_EO, quantization)


def weight_values(weight: Int8Linear) -> Tensor:
    """The numbers that the weight stands for, [O, I] float32."""
    return weight.values_OI.float() * weight.scales_O.unsqueeze(1)


def int8_linear(x_TI: Tensor, weight: Int8Linear, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` in x's dtype, summed exactly (int8 rows) or in float32 (weight only), rounded once."""
    if weight.quantization is Quantization.INT8_WEIGHT_ONLY:
        y_TO = (x_TI.float() @ weight.values_OI.float().t()) * weight.scales_O
    else:
        rows_TI, scales_T = quantize_rows(x_TI)
        # float64 holds every sum of products of int8 exactly.
        sums_TO = rows_TI.double() @ weight.values_OI.double().t()
        y_TO = sums_TO.float() * (weight.scales_O * scales_T.unsqueeze(1))
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)
