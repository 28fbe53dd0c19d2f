"""The World among threads of one process: collectives hand references from thread to thread.

Knows meetings and tensors. Does not know layouts or plans, nor how rank threads are started (`ranks/`). Members
publish their tensors and meet; the last to come makes every member's result, each in memory of its own, and lets them
go (`meeting.py` says why). That is one core's work, however many ranks there are: made for tests and `verify`, where
tensors are small or the stages between take far longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrows.comm.buffers import Buffers
from narrows.comm.meeting import Commons, Meeting
from narrows.comm.recording import Recording, Tape
from narrows.comm.stamps import Stamp, mismatch, say_columns, say_rows, say_sum, say_tensor
from narrows.comm.sums import float32_sum, sum_rows
from narrows.comm.world import RowNorm
from narrows.errors import CollectiveMismatchError

__all__ = ["ThreadWorld"]


class ThreadWorld:
    """One rank's :class:`~narrows.comm.world.World`; `run_ranks` and `ThreadRanks` make it, in the rank's thread."""

    def __init__(self, commons: Commons, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self.mesh = commons.mesh
        self.checked = commons.checked
        self.call = 0
        self._commons = commons
        self._seats: dict[tuple[int, ...], _Seat] = {}
        self._buffers = Buffers(device)

    @property
    def num_collectives(self) -> int:
        return sum(seat.number for seat in self._seats.values())

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        if len(ranks) == 1:
            return [self._buffers.owned(x) for x in xs]
        seat = self._seat(ranks)
        stamp = seat.stamp("all_gather", label)
        if self.checked:
            stamp = say_rows(stamp, self.rank, seat.me, xs, counts)
        out: list[Tensor] = self._meet(seat, stamp, xs, _gathered)
        self._buffers.give_back(xs)
        return out

    def reduce_scatter(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        if len(ranks) == 1:
            return self._joined(x, addends)
        seat = self._seat(ranks)
        stamp = seat.stamp("reduce_scatter", label)
        if self.checked:
            stamp = say_sum(stamp, self.rank, seat.me, x, counts, addends)
        out: Tensor = self._meet(seat, stamp, (x, addends), partial(_summed, counts, False))
        self._buffers.give_back((x, *addends))
        return out

    def all_reduce(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        if len(ranks) == 1:
            return self._joined(x, addends)
        seat = self._seat(ranks)
        stamp = seat.stamp("all_reduce", label)
        if self.checked:
            stamp = say_sum(stamp, self.rank, seat.me, x, counts, addends)
        out: Tensor = self._meet(seat, stamp, (x, addends), partial(_summed, counts, True))
        self._buffers.give_back((x, *addends))
        return out

    def all_reduce_norm(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
        norm: RowNorm,
    ) -> None:
        return None

    def column_gather(self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str) -> Tensor:
        if len(ranks) == 1:
            return self._buffers.owned(x)
        seat = self._seat(ranks)
        stamp = seat.stamp("column_gather", label)
        if self.checked:
            stamp = say_columns(stamp, self.rank, seat.me, x, widths)
        out: Tensor = self._meet(seat, stamp, x, _side_by_side)
        self._buffers.give_back((x,))
        return out

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        place = ranks.index(root)
        if len(ranks) == 1:
            return self._buffers.owned(x)
        seat = self._seat(ranks)
        stamp = seat.stamp("broadcast", label)
        if self.checked:
            stamp = say_tensor(stamp, x, root)
        out: Tensor = self._meet(seat, stamp, x, partial(_copies, place))
        self._buffers.give_back((x,))
        return out

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        if len(ranks) > 1:
            seat = self._seat(ranks)
            self._meet(seat, seat.stamp("barrier", label), None, _nothing)

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._buffers.lend(rows, width, dtype)

    def record(self, tape: Tape) -> Recording | None:
        return Recording(tape) if self.mesh.size == 1 else None

    def recorded(self, count: int) -> None:
        pass

    def repeat(self, recording: Recording) -> None:
        recording.tape.rewind()
        outcome = recording.tape.run()
        assert not outcome, "one rank meets nobody"

    def _seat(self, ranks: tuple[int, ...]) -> _Seat:
        seat = self._seats.get(ranks)
        if seat is None:
            assert self.rank in ranks and list(ranks) == sorted(set(ranks)), f"{ranks} is no group of rank {self.rank}"
            seat = self._seats[ranks] = _Seat(self._commons.meeting(ranks), ranks, ranks.index(self.rank))
        return seat

    def _meet(self, seat: _Seat, stamp: Stamp, thing: Any, make: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """This rank's result of what ``make`` makes; in checked mode nothing is read before all stamps agree."""

        def work(stamps: list[Stamp], brought: list[Any]) -> Sequence[Any]:
            if self.checked and (said := mismatch(seat.ranks, stamps)):
                raise CollectiveMismatchError(f"ranks met in different collectives: {said}")
            return make(brought)

        return seat.meeting.meet(seat.me, stamp._replace(call=self.call), thing, work)

    def _joined(self, x: Tensor, addends: Sequence[Tensor]) -> Tensor:
        """A sum in a group of one rank: its input, with the addends."""
        if not addends:
            return self._buffers.owned(x)
        out = sum_rows([x], 0, x.shape[0], addends)
        self._buffers.give_back((x, *addends))
        return out


class _Seat:
    """This rank's place in one group, and how often it has come there."""

    __slots__ = ("me", "meeting", "number", "ranks")

    def __init__(self, meeting: Meeting, ranks: tuple[int, ...], me: int) -> None:
        self.meeting = meeting
        self.ranks = ranks
        self.me = me
        self.number = 0

    def stamp(self, op: str, label: str) -> Stamp:
        self.number += 1
        return Stamp(self.number - 1, op, label, len(self.ranks))


def _gathered(brought: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    fields = list(zip(*brought, strict=True))
    return [[torch.cat(field) for field in fields] for _ in brought]


def _side_by_side(brought: list[Tensor]) -> list[Tensor]:
    return [torch.cat(brought, dim=1) for _ in brought]


def _summed(counts: Sequence[int], whole: bool, brought: list[tuple[Tensor, Sequence[Tensor]]]) -> list[Tensor]:
    """As if member i summed piece i, with its addends, and kept it or (``whole``) handed it to all."""
    dtype = brought[0][0].dtype
    total = float32_sum([x for x, _ in brought], 0, sum(counts))
    pieces = torch.split(total, list(counts))
    for piece, (_, addends) in zip(pieces, brought, strict=True):
        for addend in addends:
            piece.add_(addend)
    return [(total if whole else piece).to(dtype, copy=True) for piece in pieces]


def _copies(place: int, brought: list[Tensor]) -> list[Tensor]:
    return [brought[place].clone(memory_format=torch.contiguous_format) for _ in brought]


def _nothing(brought: list[None]) -> list[None]:
    return brought
