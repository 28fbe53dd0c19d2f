"""The seam between models and checkpoints: a source hands out a rank's slice of a tensor."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from narrows.arch.weights import Weight

__all__ = ["BlockSource", "WeightSource"]


class WeightSource(Protocol):
    """Hands out slices of the tensors of one checkpoint."""

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """The rows or columns ``span`` along ``weight.dim`` (all of it when None).

        In the checkpoint's dtype, or, where the checkpoint's values are quantised, in the source's. ``expert`` fills in
        the name of a tensor of which there is one per expert. The tensor may be a view of a mapped file that others
        share: do not write to it.

        Raises:
            CheckpointError: the tensor is missing, or has another shape than the model's config implies.
        """
        ...


@runtime_checkable
class BlockSource(Protocol):
    """A source that hands out weights in blocks as they are stored."""

    def take_blocks(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """The bytes of the blocks of ``weight.blocks`` that :meth:`WeightSource.take` would give the numbers of:
        [rows, bytes]. A span of columns begins and ends where blocks do."""
        ...
