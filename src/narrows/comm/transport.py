"""The interface of a transport: how tensors travel among the ranks of one group.

Legend: T rows in total, W columns; ``counts[i]`` rows of member i, T = sum(counts); ``me`` is this rank's index in the
group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from narrows.comm.captured import CapturedCollectives
from narrows.errors import RankError

__all__ = ["DifferentCallsError", "PeersLostError", "RowNorm", "Transport"]


class PeersLostError(RankError):
    """The transport failed because a peer went away. The coordinator of the ranks finds out which one, and why."""


class DifferentCallsError(Exception):
    """Members made different calls. Every member raises it, before any data is read."""


class RowNorm(NamedTuple):
    """An RMSNorm of finished rows ``[T, W]``, to which ``residual`` (if any) is added first."""

    weight_W: Tensor
    eps: float
    residual_TW: Tensor | None


class Transport(ABC):
    """One group's transport, seen from one of its ranks. All members make the same calls.

    Results are fresh memory. Sums are taken as :class:`~narrows.comm.communicator.Communicator` says.

    Errors:
        PeersLostError: a member has ended.
        DifferentCallsError: members made different calls; raised by those transports that compare them.
    """

    name: ClassVar[str]
    """For people: what carries the data."""
    can_replay: ClassVar[bool] = False
    """Whether its exchanges are compiled calls, which a captured step can make again: :meth:`capture`."""

    def __init__(self, me: int, size: int) -> None:
        self.me, self.size = me, size

    @property
    def host(self) -> Transport:
        """The transport of tensors in main memory, for fingerprints and barriers."""
        return self

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``[counts[me], ...]`` of any dtype -> ``[T, ...]``: the rows of all members in order."""
        (out,) = self.gather_fields((x,), counts)
        return out

    @abstractmethod
    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """:meth:`gather` of several matrices in one exchange."""

    @abstractmethod
    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """``[T, widths[me]]`` -> ``[T, sum(widths)]``: the columns of all members in order."""

    @abstractmethod
    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        """The sum of every member's ``x``, ``[T, W]``, to which each adds its ``addends`` in its own piece of rows.

        Returns:
            this rank's piece, or all rows if ``whole``.
        """

    def can_reduce_norm(self, x: Tensor, addends: Sequence[Tensor], norm: RowNorm) -> bool:
        """Whether :meth:`reduce_norm` takes these arguments; the answer is the same on every member."""
        return False

    def reduce_norm(
        self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], norm: RowNorm
    ) -> tuple[Tensor, Tensor]:
        """All rows of the sum, and their norm in the same pass: (normed, its input)."""
        raise NotImplementedError(self.name)

    def capture(self, into: CapturedCollectives | None) -> None:
        """Note the exchanges from now on, and the memory that they use, in ``into``; None: no more."""
        raise NotImplementedError(self.name)

    def resume(self, outcome: int) -> None:
        """Returns if a replayed exchange that ended with ``outcome`` is to be made again.

        Raises:
            PeersLostError: a member has ended.
            DifferentCallsError: a member came to another call.
        """
        raise NotImplementedError(self.name)
