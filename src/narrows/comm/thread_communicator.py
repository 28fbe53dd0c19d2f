"""The Communicator among threads of one process: collectives hand references from thread to thread.

Knows meetings and tensors. Does not know layouts or plans, nor how rank threads are started (`ranks/`). Members
publish their tensors and meet; the last to come makes every member's result, each in memory of its own, and lets them
go (`rendezvous.py` says why). That is one core's work, however many ranks there are: made for tests and `verify`, where
tensors are small or the stages between take far longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrows.comm.buffers import Buffers
from narrows.comm.communicator import RowNorm
from narrows.comm.fingerprint import Fingerprint, mismatch, say_columns, say_rows, say_sum, say_tensor
from narrows.comm.recording import Recording, Tape
from narrows.comm.rendezvous import Rendezvous, SharedState
from narrows.comm.sums import float32_sum, sum_rows
from narrows.errors import CollectiveMismatchError

__all__ = ["ThreadCommunicator"]


class ThreadCommunicator:
    """One rank's communicator; `run_ranks` and `ThreadRanks` make it, in the rank's thread."""

    def __init__(self, shared: SharedState, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self.mesh = shared.mesh
        self.checked = shared.checked
        self.call = 0
        self._shared = shared
        self._members: dict[tuple[int, ...], _Member] = {}
        self._buffers = Buffers(device)

    @property
    def num_collectives(self) -> int:
        return sum(member.number for member in self._members.values())

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        if len(ranks) == 1:
            return [self._buffers.owned(x) for x in xs]
        member = self._member(ranks)
        fingerprint = member.fingerprint("all_gather", label)
        if self.checked:
            fingerprint = say_rows(fingerprint, self.rank, member.me, xs, counts)
        out: list[Tensor] = self._meet(member, fingerprint, xs, _gathered)
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
        member = self._member(ranks)
        fingerprint = member.fingerprint("reduce_scatter", label)
        if self.checked:
            fingerprint = say_sum(fingerprint, self.rank, member.me, x, counts, addends)
        out: Tensor = self._meet(member, fingerprint, (x, addends), partial(_summed, counts, False))
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
        member = self._member(ranks)
        fingerprint = member.fingerprint("all_reduce", label)
        if self.checked:
            fingerprint = say_sum(fingerprint, self.rank, member.me, x, counts, addends)
        out: Tensor = self._meet(member, fingerprint, (x, addends), partial(_summed, counts, True))
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
        member = self._member(ranks)
        fingerprint = member.fingerprint("column_gather", label)
        if self.checked:
            fingerprint = say_columns(fingerprint, self.rank, member.me, x, widths)
        out: Tensor = self._meet(member, fingerprint, x, _side_by_side)
        self._buffers.give_back((x,))
        return out

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        place = ranks.index(root)
        if len(ranks) == 1:
            return self._buffers.owned(x)
        member = self._member(ranks)
        fingerprint = member.fingerprint("broadcast", label)
        if self.checked:
            fingerprint = say_tensor(fingerprint, x, root)
        out: Tensor = self._meet(member, fingerprint, x, partial(_copies, place))
        self._buffers.give_back((x,))
        return out

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        if len(ranks) > 1:
            member = self._member(ranks)
            self._meet(member, member.fingerprint("barrier", label), None, _nothing)

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

    def _member(self, ranks: tuple[int, ...]) -> _Member:
        member = self._members.get(ranks)
        if member is None:
            assert self.rank in ranks and list(ranks) == sorted(set(ranks)), f"{ranks} is no group of rank {self.rank}"
            member = self._members[ranks] = _Member(self._shared.rendezvous(ranks), ranks, ranks.index(self.rank))
        return member

    def _meet(
        self, member: _Member, fingerprint: Fingerprint, thing: Any, make: Callable[[list[Any]], Sequence[Any]]
    ) -> Any:
        """This rank's result of what ``make`` makes; in checked mode nothing is read before all fingerprints agree."""

        def work(fingerprints: list[Fingerprint], brought: list[Any]) -> Sequence[Any]:
            if self.checked and (said := mismatch(member.ranks, fingerprints)):
                raise CollectiveMismatchError(f"ranks met in different collectives: {said}")
            return make(brought)

        return member.rendezvous.meet(member.me, fingerprint._replace(call=self.call), thing, work)

    def _joined(self, x: Tensor, addends: Sequence[Tensor]) -> Tensor:
        """A sum in a group of one rank: its input, with the addends."""
        if not addends:
            return self._buffers.owned(x)
        out = sum_rows([x], 0, x.shape[0], addends)
        self._buffers.give_back((x, *addends))
        return out


class _Member:
    """This rank's place in one group, and how often it has come there."""

    __slots__ = ("me", "number", "ranks", "rendezvous")

    def __init__(self, rendezvous: Rendezvous, ranks: tuple[int, ...], me: int) -> None:
        self.rendezvous = rendezvous
        self.ranks = ranks
        self.me = me
        self.number = 0

    def fingerprint(self, op: str, label: str) -> Fingerprint:
        self.number += 1
        return Fingerprint(self.number - 1, op, label, len(self.ranks))


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
