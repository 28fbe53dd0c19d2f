"""Collectives of one rank, over the transports of its groups.

Legend: T rows in total, W columns; ``counts[i]`` rows of member i of the group, T = sum(counts); ``me`` is this rank's
index in the group, ``ranks.index(rank)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from narrows.comm.buffers import SendBuffers
from narrows.comm.captured import CapturedCalls, CapturedCollectives
from narrows.comm.fingerprint import (
    Fingerprint,
    decoded,
    encoded,
    mismatch,
    of_barrier,
    of_columns,
    of_rows,
    of_sum,
    of_tensor,
    rank_names,
)
from narrows.comm.sums import sum_rows
from narrows.comm.transport import DifferentCallsError, RowNorm, Transport
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh

__all__ = ["Communicator", "LastCollective"]

T = TypeVar("T")

_DIGEST = 16
"""Bytes of a fingerprint that travel when all fingerprints are equal."""
_BYTE = torch.zeros(1, dtype=torch.uint8)


class LastCollective(NamedTuple):
    """The collective that a rank came to last, and since when it waits there (None: it has left)."""

    fingerprint: Fingerprint
    ranks: tuple[int, ...]
    since: float | None


class Communicator:
    """The ranks of a mesh, seen from one of them; `connect.py` makes it.

    The rules that hold for every method and every transport:

    - Every member of ``ranks`` (world ranks, in rank order, this one among them) makes the same call with the same
      ``ranks``, ``counts`` and ``label``, and as many addends. No member skips it: 0 rows for a member or for all of
      them, 1 row on 8 ranks and width 0 are ordinary.
    - ``ranks`` is a group along consecutive axes of the mesh. To ask for another one is an error in the plan.
    - A result is the caller's own: never a peer's memory, never a send buffer, never the input, except that a group
      of one rank gets its input back (if that is not a send buffer) and waits for no other.
    - An input may be written again as soon as the call has returned.
    - On CPU a sum is taken in float32, ``((x_0 + x_1) + x_2) + ...`` in the order of ``ranks``, then this rank's
      addends in their order, and rounded once to ``x.dtype``: the same bits whichever collective takes it.
    - ``levels``: in the hosts and between them, where a group has several ranks on one of several hosts; elsewhere it
      changes nothing. Then a sum is taken host by host, and what a host has summed is rounded too (`hierarchical.py`):
      the same bits on every rank and by every collective, but not those of one host.
    - Nothing hangs. A member that does not come is named, with the label the others wait at. Among threads the
      rendezvous times out; among processes `ranks/` watches :attr:`where`.

    Args:
        transports: one for each group of this rank that has several members.
        levels: for groups that can exchange in two levels, the transport that does.
        checked: compare the members' fingerprints before any data is read.
        transport: how the data travels, for people.

    Errors:
        RankError: another rank failed first, or did not come in time; it is named.
        CollectiveMismatchError: members came with different calls, or with a tensor that does not fit the counts.
            In checked mode it is raised before any data is read, and names the calls that ranks came with.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        transports: Mapping[tuple[int, ...], Transport],
        *,
        checked: bool,
        buffers: SendBuffers,
        device: torch.device,
        transport: str = "",
        levels: Mapping[tuple[int, ...], Transport] = MappingProxyType({}),
    ) -> None:
        self.mesh = mesh
        self.rank = rank
        self.device = device
        """Where this rank's tensors are."""
        self.checked = checked
        self.transport = transport
        self.call = 0
        """The engine's call that this rank is in, counted from 1: part of every fingerprint."""
        self._members = {ranks: _Member(ranks, transport, levels.get(ranks)) for ranks, transport in transports.items()}
        self._buffers = buffers
        self._where: LastCollective | None = None
        self._captured: CapturedCollectives | None = None
        self._replayed: CapturedCollectives | None = None

    # --- collectives

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str, *, levels: bool = False
    ) -> list[Tensor]:
        """The rows of all members, in rank order, for several fields packed in one exchange.

        Args:
            xs: field f is ``[counts[me], W_f]``; each field has its own width and dtype, the same on every member.

        Returns:
            field f as ``[T, W_f]``.
        """
        if len(ranks) == 1:
            return [self._buffers.owned(x) for x in xs]
        member = self._member(ranks)
        op, transport = member.way("all_gather", levels)
        out = self._meet(member, op, label, of_rows, transport.gather_fields, xs, counts)
        self._buffers.give_back(xs)
        return out

    def reduce_scatter(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
        *,
        levels: bool = False,
    ) -> Tensor:
        """This rank's rows of the sum over the members, plus this rank's ``addends``; rounded once.

        Args:
            x: ``[T, W]``, this rank's part of the owed sum.
            addends: each ``[counts[me], W]``, of any floating dtype.

        Returns:
            ``[counts[me], W]`` in ``x.dtype``.
        """
        return self._reduce("reduce_scatter", x, ranks, counts, label, addends, levels)

    def all_reduce(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
        *,
        levels: bool = False,
    ) -> Tensor:
        """All rows of the sum: bit for bit :meth:`reduce_scatter` followed by :meth:`all_gather` with these counts.

        The rows of piece i are summed by member i, which adds its own ``addends`` to them.

        Args:
            x: ``[T, W]``, this rank's part of the owed sum.
            addends: each ``[counts[me], W]``, of any floating dtype.

        Returns:
            ``[T, W]`` in ``x.dtype``.
        """
        return self._reduce("all_reduce", x, ranks, counts, label, addends, levels)

    def all_reduce_norm(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
        norm: RowNorm,
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`all_reduce` and the norm of its rows in one pass, with the bits of one after the other.

        Returns:
            (normed, the norm's input). None, on all members alike and without meeting anybody, where the transport has
            no such kernel for these sizes: then the caller makes the two calls.
        """
        if len(ranks) == 1:
            return None
        member = self._member(ranks)
        transport = member.transport
        if not transport.can_reduce_norm(x, addends, norm):
            return None
        out = self._meet(member, "all_reduce_norm", label, of_sum, transport.reduce_norm, x, counts, addends, norm)
        self._buffers.give_back((x, *addends))
        return out

    def column_gather(
        self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str, *, levels: bool = False
    ) -> Tensor:
        """The columns of all members, in rank order: ``[T, widths[me]]`` -> ``[T, sum(widths)]``."""
        if len(ranks) == 1:
            return self._buffers.owned(x)
        member = self._member(ranks)
        op, transport = member.way("column_gather", levels)
        out = self._meet(member, op, label, of_columns, transport.gather_columns, x, widths)
        self._buffers.give_back((x,))
        return out

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        """``x`` of the world rank ``root``, on every member.

        On the other members ``x`` gives shape and dtype; its content is not read. Any shape.
        """
        sender = ranks.index(root)
        if len(ranks) == 1:
            return self._buffers.owned(x)
        member = self._member(ranks)
        counts = [x.numel() if i == sender else 0 for i in range(len(ranks))]
        sent = x.reshape(-1) if member.me == sender else x.new_empty(0)
        out = self._meet(member, "broadcast", label, of_tensor(x, root), member.transport.gather, sent, counts)
        self._buffers.give_back((x,))
        return out.view(x.shape)

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        """Returns when every member has come."""
        if len(ranks) > 1:
            member = self._member(ranks)
            self._meet(member, "barrier", label, of_barrier, member.transport.host.gather, _BYTE, member.ones)

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``[rows, width]`` memory on this rank's device, from which collectives send without a copy.

        Valid until the collective that it is handed to (as ``x``, as one of ``xs``, or as an addend) returns. Two
        buffers taken before that are two different pieces of memory, whatever their shapes. A buffer that is
        never handed to a collective is never reused.
        """
        return self._buffers.lend(rows, width, dtype)

    def _reduce(
        self,
        op: str,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
        levels: bool,
    ) -> Tensor:
        if len(ranks) == 1:
            if not addends:
                return self._buffers.owned(x)
            out = sum_rows([x], 0, x.shape[0], addends)
        else:
            member = self._member(ranks)
            whole = op == "all_reduce"
            op, transport = member.way(op, levels)
            out = self._meet(member, op, label, of_sum, transport.reduce, x, counts, addends, whole)
        self._buffers.give_back((x, *addends))
        return out

    def _member(self, ranks: tuple[int, ...]) -> _Member:
        member = self._members.get(ranks)
        assert member is not None, f"{ranks} is no group of rank {self.rank} along consecutive axes of {self.mesh}"
        return member

    def _meet(
        self,
        member: _Member,
        op: str,
        label: str,
        shaped: Callable[..., Fingerprint],
        work: Callable[..., T],
        *args: Any,
    ) -> T:
        """``work(*args)``, a call of the group's transport; in checked mode not before all fingerprints agree.

        Args:
            shaped: adds the shapes of ``args`` to a fingerprint, for checked mode.
        """
        fingerprint = Fingerprint(member.number, op, label, len(member.ranks), call=self.call)
        member.number += 1
        if self.checked:
            fingerprint = shaped(fingerprint, self.rank, member.me, *args)
        self._where = LastCollective(fingerprint, member.ranks, monotonic())
        if self.checked:
            self._compare(member, fingerprint)
        if self._captured is not None:
            self._captured.collective(member, fingerprint)
        try:
            out = work(*args)
        except DifferentCallsError:
            raise self._different(fingerprint, member.ranks) from None
        self._where = LastCollective(fingerprint, member.ranks, None)
        return out

    def _compare(self, member: _Member, fingerprint: Fingerprint) -> None:
        """Raises if the members' fingerprints differ: their digests travel, and if those differ the whole."""
        num, gather = len(member.ranks), member.transport.host.gather
        mine = encoded(fingerprint)
        digests = gather(_tensor(blake2b(mine, digest_size=_DIGEST).digest()), (_DIGEST,) * num).numpy().tobytes()
        if digests == digests[:_DIGEST] * num:
            return
        sizes = gather(torch.tensor([len(mine)]), member.ones).tolist()
        texts = torch.split(gather(_tensor(mine), sizes), sizes)
        fingerprints = [decoded(text.numpy().tobytes()) for text in texts]
        raise CollectiveMismatchError(f"ranks met in different collectives: {mismatch(member.ranks, fingerprints)}")

    def _different(self, fingerprint: Fingerprint, ranks: tuple[int, ...]) -> CollectiveMismatchError:
        return CollectiveMismatchError(
            f"rank {self.rank} came to {fingerprint}, another of {rank_names(ranks)} to something else; "
            "in checked mode both are named"
        )

    # --- progress; any thread may ask

    @property
    def came(self) -> dict[tuple[int, ...], int]:
        """How often this rank has come to a collective of each group."""
        replayed = self._replayed
        return {ranks: m.number + (replayed.came(m) if replayed else 0) for ranks, m in self._members.items()}

    @property
    def num_collectives(self) -> int:
        """How many collectives this rank has come to, in all of its groups together."""
        return sum(self.came.values())

    @property
    def where(self) -> LastCollective | None:
        """The collective that this rank came to last; None before the first."""
        replayed = self._replayed
        latest = replayed.latest() if replayed else None
        if latest is None:
            return self._where
        fingerprint, member, since = latest
        return LastCollective(fingerprint._replace(call=self.call), member.ranks, since)

    # --- captured steps

    def capture_begin(self, calls: CapturedCalls) -> CapturedCollectives | None:
        """Keep what :meth:`replay` needs of the collectives from now on, whose compiled calls ``calls`` records.

        Returns:
            what it keeps, complete after :meth:`capture_end`; None where collectives are more than compiled calls
            (other transports, checked mode), so that they cannot be replayed.
        """
        members = self._members.values()
        if members and (self.checked or not all(member.transport.can_replay for member in members)):
            return None
        self._capture(CapturedCollectives(calls))
        return self._captured

    def capture_end(self, count: int) -> None:
        """End the capture and keep the first ``count`` calls."""
        assert self._captured is not None, "nothing is captured"
        self._captured.end(count)
        self._capture(None)

    def _capture(self, captured: CapturedCollectives | None) -> None:
        self._captured = captured
        for member in self._members.values():
            member.transport.capture(captured)

    def replay(self, captured: CapturedCollectives) -> None:
        """Make all captured calls again, the collectives among them, with the same tensors.

        Every member of each group makes them too, by replay or by calling them. Errors are those of the collectives.
        """
        captured.calls.rewind()
        self._replayed = captured
        while outcome := captured.calls.run():
            latest = captured.latest()
            assert latest is not None, "only an exchange interrupts a replay"
            fingerprint, member, _ = latest
            captured.waits()
            try:
                self._members[member.ranks].transport.resume(outcome)
            except DifferentCallsError:
                raise self._different(fingerprint, member.ranks) from None
        where = self.where
        self._where, self._replayed = where and where._replace(since=None), None
        captured.done()


class _Member:
    """This rank in one group: its transports, and how many collectives it has come to there."""

    def __init__(self, ranks: tuple[int, ...], transport: Transport, levels: Transport | None) -> None:
        self.ranks = ranks
        self.transport, self._levels = transport, levels
        self.me = transport.me
        self.number = 0
        self.ones = (1,) * len(ranks)

    def way(self, op: str, levels: bool) -> tuple[str, Transport]:
        """The name of a collective, which says how it is done, and the transport that does it."""
        if levels and self._levels is not None:
            return f"hierarchical {op}", self._levels
        return op, self.transport


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
