"""The seam between models and checkpoints: a source hands out a rank's slice of a tensor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from narrows.arch.weights import Weight

__all__ = ["WeightSource"]


class WeightSource(Protocol):
    """Hands out slices of the tensors of one checkpoint."""

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """The rows or columns ``span`` along ``weight.dim`` (all of it when None), in the checkpoint's dtype.

        ``expert`` fills in the name of a tensor of which there is one per expert. The tensor is the caller's own.

        Raises:
            CheckpointError: the tensor is missing, or has another shape than the model's config implies.
        """
        ...
