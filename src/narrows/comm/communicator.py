"""The Communicator: the protocol every implementation of collectives keeps, and nothing else.

Knows tensors, groups of ranks and row counts. Does not know layouts, plans, models, or why anything is moved: it
moves and decides nothing. Which collective runs when is said by the plan and is the same on every rank.

Legend: T rows in total, W columns; ``counts[i]`` rows of member i of the group, T = sum(counts); ``me`` is the place of
this rank in the group, ``ranks.index(rank)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from narrows.comm.recording import Recording, Tape
from narrows.layout import Mesh

__all__ = ["Communicator", "RowNorm"]


class RowNorm(NamedTuple):
    """An RMSNorm of finished rows ``[T, W]``, to which ``residual`` (if any) is added first."""

    weight_W: Tensor
    eps: float
    residual_TW: Tensor | None


class Communicator(Protocol):
    """The ranks, seen from one of them.

    The rules that hold for every method and every implementation:

    - Every member of ``ranks`` (world ranks, in rank order, this one among them) makes the same call with the same
      ``ranks``, ``counts`` and ``label``, and as many addends. Nobody skips it: 0 rows for a member or for all of
      them, 1 row on 8 ranks and width 0 are ordinary.
    - A result is the caller's own: never a peer's memory, never a send buffer, never the input, except that a group
      of one rank gets its input back (if that is not a send buffer) and meets nobody.
    - An input may be written again as soon as the call has returned.
    - On CPU a sum is taken in float32, ``((x_0 + x_1) + x_2) + ...`` in the order of ``ranks``, then this rank's
      addends in their order, and rounded once to ``x.dtype``: the same bits whichever collective takes it.
    - Nothing hangs. A member that does not come is named, with the label the others wait at.

    Errors:
        RankError: another rank failed first, or did not come in time; it is named.
        CollectiveMismatchError: (checked mode) members came with different calls, or with a tensor that does not fit
            the counts; raised before any data is read, and says who came with what.
    """

    rank: int
    mesh: Mesh
    device: torch.device
    """Where this rank's tensors are."""
    checked: bool

    @property
    def num_collectives(self) -> int:
        """How many collectives this rank has come to, in all of its groups together."""
        ...

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        """The rows of all members, in rank order, for several fields packed in one exchange.

        Args:
            xs: field f is ``[counts[me], W_f]``; each field has its own width and dtype, the same on every member.

        Returns:
            field f as ``[T, W_f]``.
        """
        ...

    def reduce_scatter(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        """This rank's rows of the sum over the members, plus this rank's ``addends``; rounded once.

        Args:
            x: ``[T, W]``, this rank's addend of the sum that is owed.
            addends: each ``[counts[me], W]``, of any floating dtype.

        Returns:
            ``[counts[me], W]`` in ``x.dtype``.
        """
        ...

    def all_reduce(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        """All rows of the sum: bit for bit :meth:`reduce_scatter` followed by :meth:`all_gather` with these counts.

        The rows of piece i are summed by member i, who adds its own ``addends`` to them.

        Args:
            x: ``[T, W]``, this rank's addend of the sum that is owed.
            addends: each ``[counts[me], W]``, of any floating dtype.

        Returns:
            ``[T, W]`` in ``x.dtype``.
        """
        ...

    def all_reduce_norm(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
        norm: RowNorm,
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`all_reduce` and the norm of its rows in one pass: (normed, what was normed), the bits of one after the
        other.

        None, on all members alike and without meeting anybody, where there is no such kernel for these sizes:
        then the caller does the two.
        """
        ...

    def column_gather(self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str) -> Tensor:
        """The columns of all members, in rank order: ``[T, widths[me]]`` -> ``[T, sum(widths)]``."""
        ...

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        """``x`` of the world rank ``root``, on every member.

        On the other members ``x`` says shape and dtype; its content is not read. Any shape.
        """
        ...

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        """Returns when every member has come."""
        ...

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``[rows, width]`` memory on the ranks' device that is sent from without a copy.

        Valid until the collective that it is handed to (as ``x``, as one of ``xs``, or as an addend) returns. Two
        buffers asked for before that are two different pieces of memory, whatever their shapes. A buffer that is
        never handed to a collective is never reused.
        """
        ...

    def record(self, tape: Tape) -> Recording | None:
        """Keep what :meth:`repeat` needs of the collectives from now on, whose compiled calls are recorded on ``tape``.

        Returns:
            what it keeps, complete when :meth:`recorded` is called; None where collectives are more than compiled
            calls (other transports, checked mode), so that they cannot be repeated.
        """
        ...

    def recorded(self, count: int) -> None:
        """Ends :meth:`record`: the first ``count`` calls of the tape are kept."""
        ...

    def repeat(self, recording: Recording) -> None:
        """Make all calls of the recording's tape again, the collectives among them, with the same tensors.

        Every member of each group makes them too, by repeating or anew. Errors are those of the collectives.
        """
        ...
