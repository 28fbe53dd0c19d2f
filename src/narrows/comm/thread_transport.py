"""The transport among threads of one process: collectives hand references from thread to thread.

Members bring their tensors to a rendezvous; the last to come makes every member's result, each in its own memory.
That is one core's work, however many ranks there are. It is made for tests and `verify`, where tensors are small or the
stages between collectives take far longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from narrows.comm.rendezvous import Rendezvous
from narrows.comm.sums import float32_sum
from narrows.comm.transport import Transport

__all__ = ["ThreadTransport"]


class ThreadTransport(Transport):
    """One group's transport, seen from the thread of one member."""

    name = "memory of one process"

    def __init__(self, rendezvous: Rendezvous, me: int, size: int) -> None:
        super().__init__(me, size)
        self._rendezvous = rendezvous

    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        out: list[Tensor] = self._rendezvous.meet(self.me, xs, _rows)
        return out

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        out: Tensor = self._rendezvous.meet(self.me, x, _columns)
        return out

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        out: Tensor = self._rendezvous.meet(self.me, (x, addends), partial(_sums, counts, whole))
        return out


def _rows(values: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    fields = list(zip(*values, strict=True))
    return [[torch.cat(field) for field in fields] for _ in values]


def _columns(values: list[Tensor]) -> list[Tensor]:
    return [torch.cat(values, dim=1) for _ in values]


def _sums(counts: Sequence[int], whole: bool, values: list[tuple[Tensor, Sequence[Tensor]]]) -> list[Tensor]:
    """Member i's piece of the sum with its addends; all pieces for every member if ``whole``."""
    dtype = values[0][0].dtype
    total = float32_sum([x for x, _ in values], 0, sum(counts))
    pieces = torch.split(total, list(counts))
    for piece, (_, addends) in zip(pieces, values, strict=True):
        for addend in addends:
            piece.add_(addend)
    return [(total if whole else piece).to(dtype, copy=True) for piece in pieces]
