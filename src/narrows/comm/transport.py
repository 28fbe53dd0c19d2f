"""How bytes travel between the processes of one group of ranks: what every transport can, and gloo's and NCCL's.

gloo connects CPUs of several hosts, and those of one where there is no compiled code (`shm.py` is for the rest).

Knows tensors, row counts and torch's process groups, which it makes itself: nothing here is registered with
``torch.distributed``, so that several can live in one process. Does not know labels, meshes or checked mode
(`dist_world.py`), nor who a rank that went away was (`ranks/`).

Gloo's own reductions have an order of their own, and its gathers want equal pieces. Here every piece is sent to whom it
is for, as long as it is and from where it lies; sums are taken by `sums.py`. So nothing is padded, and a sum has the
same bits as among threads.

Legend: T rows in total, W columns; ``counts[i]`` rows of member i, T = sum(counts); ``me`` this rank's place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from narrows.comm.buffers import Buffers
from narrows.comm.fields import gather_as_rows, gather_packed
from narrows.comm.sums import sum_rows
from narrows.errors import RankError

__all__ = ["DifferentCallsError", "GlooTransport", "NcclTransport", "PeersLostError", "Transport", "open_transports"]

_SMALL = 32 * 1024
"""Bytes that every rank may send to every other to save one of the two exchanges of an all-reduce."""
_GIVE_UP = timedelta(days=1)
"""Gloo's own limit. Whoever watches the ranks knows much earlier, and says who is missing."""


class PeersLostError(RankError):
    """The transport failed: some peer went away. Which one, and why, is for whoever watches all ranks to say."""


class DifferentCallsError(Exception):
    """A member came to another call than this one: found before anything was read, on all members alike."""


class Transport(Protocol):
    """One group's transport, seen from one of its ranks. All members make the same calls."""

    me: int
    size: int

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``[counts[me], W]`` of any dtype -> fresh ``[T, W]``: the rows of all members in order."""
        ...

    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """:meth:`gather` of several matrices in one exchange."""
        ...

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """``[T, widths[me]]`` -> fresh ``[T, sum(widths)]``: the columns of all members in order."""
        ...

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        """The sum of every member's ``x``, ``[T, W]``, to which each adds its ``addends`` in its own piece of rows.

        Returns:
            this rank's piece, or all rows if ``whole``; fresh memory.
        """
        ...


def open_transports(
    store: Any, ranks: tuple[int, ...], rank: int, device: torch.device, address: str
) -> tuple[Transport, Transport]:
    """This rank's transports in the group ``ranks``: for bytes in main memory, and for ``device``'s tensors.

    Args:
        store: a ``torch.distributed`` store that all ranks have.
        address: this host's address that the others can reach; ``GLOO_SOCKET_IFNAME``, if set, overrides it.

    Raises:
        PeersLostError: the members did not find each other.
    """
    name = "-".join(map(str, ranks))
    me, size = ranks.index(rank), len(ranks)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    try:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        where = {"interface": interface} if interface else {"hostname": address}
        options._devices = [ProcessGroupGloo.create_device(**where)]
        options._timeout = _GIVE_UP
        options._threads = 1
        gloo = GlooTransport(ProcessGroupGloo(PrefixStore(f"gloo {name}", store), me, size, options), me, size)
        if device.type == "cpu":
            return gloo, gloo
        return gloo, NcclTransport(PrefixStore(f"nccl {name}", store), me, size)
    except RuntimeError as error:
        raise PeersLostError(f"rank {rank} did not find the ranks {ranks}: {_text(error)}") from error


class _RowsTransport:
    """A transport that gathers one matrix of rows: all else is made of that."""

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        return gather_packed(self.gather, xs, counts)

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return gather_as_rows(self.gather, x, widths)


class GlooTransport(_RowsTransport):
    """Point-to-point messages over TCP, as many as there are pieces with something in them."""

    def __init__(self, group: Any, me: int, size: int) -> None:
        self.me, self.size = me, size
        self._group = group
        self._buffers = Buffers()
        self._others = [(me + step) % size for step in range(1, size)]  # nobody is everybody's first
        self._wreck: list[Any] = []

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        pieces = torch.split(out, list(counts))
        mine = pieces[self.me].copy_(x)
        self.exchange({i: mine for i in self._others}, {i: pieces[i] for i in self._others})
        return out

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        x = x.contiguous()
        if whole and not addends and x.nbytes <= _SMALL:
            return self._sum(x, {i: x for i in self._others}, x.shape[0], ())
        pieces = torch.split(x, list(counts))
        total = self._sum(pieces[self.me], {i: pieces[i] for i in self._others}, counts[self.me], addends)
        return self.gather(total, counts) if whole else total

    def _sum(self, mine: Tensor, sends: dict[int, Tensor], rows: int, addends: Sequence[Tensor]) -> Tensor:
        """Sends each peer its part, receives as many rows as ``mine`` has from each, and sums them in rank order."""
        parts = {i: self._buffers.lend(rows, mine.shape[1], mine.dtype) for i in self._others}
        self.exchange(sends, parts)
        total = sum_rows([mine if i == self.me else parts[i] for i in range(self.size)], 0, rows, addends)
        self._buffers.give_back(list(parts.values()))
        return total

    def exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """Contiguous tensors to and from peers; those without elements do not travel. Returns when all is done.

        Raises:
            PeersLostError: a peer went away.
        """
        try:
            works = [self._group.recv([x], i, 0) for i, x in receives.items() if x.numel()]
            works += [self._group.send([x], i, 0) for i, x in sends.items() if x.numel()]
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._wreck += [sends, receives]  # what is still under way may yet read or write them
            raise PeersLostError(_text(error)) from error


class NcclTransport(_RowsTransport):
    """NCCL's own collectives, on pieces padded to the largest with zeros. IT HAS NEVER RUN ON A GPU.

    Sums are NCCL's: its order, in the dtype of ``x``; addends join before, in this rank's own addend of its piece.
    """

    def __init__(self, store: Any, me: int, size: int) -> None:
        self.me, self.size = me, size
        nccl = dist.ProcessGroupNCCL  # only builds for CUDA have it
        self._group: Any = nccl(store, me, size, nccl.Options())

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        largest = max(counts)
        padded = x.new_zeros((largest, *x.shape[1:]))
        if not padded.numel():
            return x.new_empty((sum(counts), *x.shape[1:]))
        padded[: counts[self.me]] = x
        out = x.new_empty((self.size * largest, *x.shape[1:]))
        self._group._allgather_base(out, padded).wait()
        return torch.cat([piece[:rows] for piece, rows in zip(torch.split(out, largest), counts, strict=True)])

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        largest = max(counts)
        mine = x.clone(memory_format=torch.contiguous_format)
        pieces = torch.split(mine, list(counts))
        for addend in addends:
            pieces[self.me].add_(addend)
        if not mine.numel():
            return mine if whole else pieces[self.me]
        if whole:
            self._group.allreduce([mine]).wait()
            return mine
        padded = x.new_zeros((self.size * largest, x.shape[1]))
        for slot, piece in zip(torch.split(padded, largest), pieces, strict=True):
            slot[: piece.shape[0]] = piece
        out = x.new_empty((largest, x.shape[1]))
        self._group._reduce_scatter_base(out, padded).wait()
        return out[: counts[self.me]]


def _text(error: RuntimeError) -> str:
    """The first line of what torch says, without the place in its sources."""
    line = str(error).partition("\n")[0]
    return line.rpartition(".cc:")[2].partition("] ")[2] or line
