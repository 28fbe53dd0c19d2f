"""The rows of cos and sin that a step's rows are rotated by, also where they depend on the length of the sequence.

For most checkpoints a row's angles are those of its position: rows of one table. With ``dynamic`` and ``longrope`` they
also depend on how long the sequence is (``by_length``). transformers takes the longest sequence of the call. Here it is
the row's own: the whole prompt for rows of a prompt, and what has been generated up to the row itself for others. That
is what transformers computes for one prompt and the text generated after it, and depends neither on the other requests
of a step nor on where a prompt is cut. Keys stay in the cache as they were rotated.

Letters: T rows, P positions in the table, D rotated columns per head, ``D2`` = D / 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from narrows.ops.rope import dynamic_base, rope_inverse_frequencies, rope_table
from narrows.ops.step_block import Part, StepBlock

__all__ = ["Lengths", "RopeAngles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of the sequences that a step's rows belong to: by row, and for the rows of long prompts alone."""

    lengths_T: Part
    long_rows_X: Part | None
    long_lengths_X: Part | None


class RopeAngles:
    """cos and sin for positions 0 .. num_positions - 1.

    Args:
        dim: rotated columns per head. ``theta``, ``scaling``, ``max_position``: as `rope_inverse_frequencies` takes
            them. ``dtype``: of the table.
    """

    def __init__(
        self,
        dim: int,
        theta: float,
        *,
        scaling: Mapping[str, object] | None,
        max_position: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dim, self._theta, self._scaling, self._max_position = dim, theta, scaling, max_position
        self._num_positions, self._dtype = num_positions, dtype
        kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
        self._is_dynamic, self._is_long = kind == "dynamic", kind == "longrope"
        tables = [self._of_length(0)]
        if self._is_long:
            original = scaling.get("original_max_position_embeddings") if scaling is not None else None
            self._short_up_to = int(original) if isinstance(original, int | float) else max_position
            if num_positions > self._short_up_to:
                tables.append(self._of_length(num_positions))
        if self._is_dynamic and num_positions > max_position:
            tables = [self._as_generated()]
        self.by_length = len(tables) > 1 or (self._is_dynamic and num_positions > max_position)
        """Whether :meth:`rows` needs the lengths of the rows' sequences."""
        self._cos_PD2, self._sin_PD2 = (torch.cat(parts).to(device) for parts in zip(*tables, strict=True))

    def stage(self, lengths: Sequence[int], block: StepBlock) -> Lengths:
        """Puts ``lengths``, of each row's sequence in tokens, into a step's block, for :meth:`rows`."""
        long = [row for row, length in enumerate(lengths) if length > self._max_position] if self._is_dynamic else []
        return Lengths(
            lengths_T=block.put(lengths),
            long_rows_X=block.put(long) if long else None,
            long_lengths_X=block.put(np.asarray(lengths)[long]) if long else None,
        )

    def rows(
        self,
        positions_T: Tensor,
        lengths: Lengths | None = None,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D/2] of rows at ``positions_T`` (int64) in sequences of ``lengths``.

        ``lengths`` None: each row is the last of its sequence. ``cos`` and ``sin``: what to write to.
        """
        at_T = positions_T
        if self._is_long and self.by_length:
            lengths_T = positions_T + 1 if lengths is None else lengths.lengths_T.tensor
            at_T = positions_T + (lengths_T > self._short_up_to) * self._num_positions
        cos_TD2 = torch.index_select(self._cos_PD2, 0, at_T, out=cos)
        sin_TD2 = torch.index_select(self._sin_PD2, 0, at_T, out=sin)
        if self._is_dynamic and self.by_length and lengths is not None:
            self._rotate_prompts(positions_T, lengths, cos_TD2, sin_TD2)
        return cos_TD2, sin_TD2

    def _of_length(self, length: int) -> tuple[Tensor, Tensor]:
        inv_freq_D2, factor = rope_inverse_frequencies(
            self._dim, self._theta, scaling=self._scaling, max_position=self._max_position, length=length
        )
        return rope_table(inv_freq_D2, factor, self._num_positions, self._dtype)

    def _as_generated(self) -> tuple[Tensor, Tensor]:
        """Each position as the last of its sequence."""
        return self._dynamic(torch.arange(self._num_positions), torch.arange(1, self._num_positions + 1))

    def _rotate_prompts(self, positions_T: Tensor, lengths: Lengths, cos_TD2: Tensor, sin_TD2: Tensor) -> None:
        """Rows of prompts that are longer than the model's positions: their prompt's angles in place of their own."""
        if lengths.long_rows_X is None or lengths.long_lengths_X is None:
            return
        at_X = lengths.long_rows_X.tensor
        cos_XD2, sin_XD2 = self._dynamic(positions_T[at_X], lengths.long_lengths_X.tensor)
        cos_TD2.index_copy_(0, at_X, cos_XD2)
        sin_TD2.index_copy_(0, at_X, sin_XD2)

    def _dynamic(self, positions_T: Tensor, lengths_T: Tensor) -> tuple[Tensor, Tensor]:
        assert self._scaling is not None
        base_T = dynamic_base(self._dim, self._theta, self._scaling, self._max_position, lengths_T)
        exponent_D2 = torch.arange(0, self._dim, 2, device=positions_T.device).to(torch.float32) / self._dim
        angles_TD2 = positions_T.to(torch.float32)[:, None] * (1.0 / base_T[:, None] ** exponent_D2)
        return angles_TD2.cos().to(self._dtype), angles_TD2.sin().to(self._dtype)
