"""Transports over torch's process groups: gloo among CPUs, and NCCL among GPUs.

gloo connects CPUs of several hosts, and those of one host where there is no compiled code (`shm_transport.py`). The
process groups are not registered with ``torch.distributed``, so that one process can hold several communicators.

gloo's own reductions add in another order, and its gathers want equal pieces. So every piece is sent from where it
lies to the rank that needs it, as long as it is, and `sums.py` takes the sums: nothing is padded, and a sum has the
same bits as among threads.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from narrows.comm.buffers import Buffers
from narrows.comm.sums import sum_rows
from narrows.comm.transport import PeersLostError, Transport

__all__ = ["GlooTransport", "Messages", "NcclTransport", "RowTransport", "open_gloo", "open_transport", "viewed"]

_SMALL = 32 * 1024
"""Bytes that every rank may send to every other to save one of the two exchanges of an all-reduce."""
_GIVE_UP = timedelta(days=1)
"""Gloo's own limit. The watchdog of the ranks knows much earlier, and names the missing one."""


def open_transport(store: Any, ranks: tuple[int, ...], rank: int, device: torch.device, address: str) -> Transport:
    """This rank's transport of ``device``'s tensors in the group ``ranks``; arguments and errors of `open_gloo`."""
    gloo = open_gloo(store, ranks, rank, address)
    if device.type == "cpu":
        return gloo
    with _found(ranks, rank):
        return NcclTransport(PrefixStore(f"nccl {_name(ranks)}", store), gloo.me, gloo.size, gloo)


def open_gloo(store: Any, ranks: tuple[int, ...], rank: int, address: str) -> GlooTransport:
    """This rank's transport over TCP in the group ``ranks``.

    Args:
        store: a ``torch.distributed`` store that all ranks have.
        address: this host's address that the others can reach; ``GLOO_SOCKET_IFNAME``, if set, overrides it.

    Raises:
        PeersLostError: the members did not find each other.
    """
    me, size = ranks.index(rank), len(ranks)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    with _found(ranks, rank):
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        where = {"interface": interface} if interface else {"hostname": address}
        options._devices = [ProcessGroupGloo.create_device(**where)]
        options._timeout = _GIVE_UP
        options._threads = 1
        group = ProcessGroupGloo(PrefixStore(f"gloo {_name(ranks)}", store), me, size, options)
        return GlooTransport(group, me, size)


@contextmanager
def _found(ranks: tuple[int, ...], rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeersLostError(f"rank {rank} did not find the ranks {ranks}: {_text(error)}") from error


def _name(ranks: tuple[int, ...]) -> str:
    return "-".join(map(str, ranks))


class RowTransport(Transport):
    """A transport that gathers one matrix of rows; fields and columns are gathered by means of that."""

    @abstractmethod
    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor: ...

    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Several fields travel as one matrix of bytes: row by row, the fields side by side."""
        if len(xs) == 1:
            return [self.gather(xs[0], counts)]
        widths = [x.shape[1] * x.itemsize for x in xs]
        rows = [viewed(x.contiguous(), torch.uint8, width) for x, width in zip(xs, widths, strict=True)]
        parts = torch.split(self.gather(torch.cat(rows, dim=1), counts), widths, dim=1)
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return [viewed(copy, x.dtype, x.shape[1]) for copy, x in zip(copies, xs, strict=True)]

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The columns travel as rows of one number."""
        rows = x.shape[0]
        sizes = [rows * width for width in widths]
        pieces = torch.split(self.gather(x.reshape(-1), sizes), sizes)
        return torch.cat([piece.view(rows, width) for piece, width in zip(pieces, widths, strict=True)], dim=1)


class GlooTransport(RowTransport):
    """Point-to-point messages over TCP; pieces without elements are not sent."""

    name = "gloo over TCP"

    def __init__(self, group: Any, me: int, size: int) -> None:
        super().__init__(me, size)
        self._group = group
        self._buffers = Buffers()
        self._others = [(me + step) % size for step in range(1, size)]  # each member begins with another peer
        self._unfinished: list[Any] = []

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        pieces = torch.split(out, list(counts))
        mine = pieces[self.me].copy_(x)
        self.exchange({i: mine for i in self._others}, {i: pieces[i] for i in self._others})
        return out

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        x = x.contiguous()
        if whole and not addends and (self.size == 2 or x.nbytes <= _SMALL):  # two send as much either way
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
        """Sends contiguous tensors to peers and receives from them; returns when all is done.

        Raises:
            PeersLostError: a peer went away.
        """
        messages = self.messages()
        for i, x in receives.items():
            messages.receive(i, x)
        for i, x in sends.items():
            messages.send(i, x)
        messages.wait()

    def messages(self) -> Messages:
        """An exchange whose messages are handed over one by one; none of them may be under way yet."""
        return Messages(self._group, self._unfinished)


class Messages:
    """Messages of one exchange with the members of a group, at most one each way per peer.

    Tensors are contiguous, and untouched until :meth:`wait` has returned. ``unfinished``: keeps them if it fails, since
    messages under way may still read or write them.

    Errors:
        PeersLostError: a peer went away.
    """

    def __init__(self, group: Any, unfinished: list[Any]) -> None:
        self._group, self._unfinished = group, unfinished
        self._works: list[Any] = []
        self._tensors: list[Tensor] = []

    def receive(self, peer: int, x: Tensor) -> None:
        """Let what ``peer`` sends be written to ``x``."""
        self._begin(self._group.recv, peer, x)

    def send(self, peer: int, x: Tensor) -> None:
        self._begin(self._group.send, peer, x)

    def _begin(self, function: Any, peer: int, x: Tensor) -> None:
        if not x.numel():
            return
        self._tensors.append(x)
        with self._under_way():
            self._works.append(function([x], peer, 0))

    def wait(self) -> None:
        """Returns when all messages have come, and all have been sent."""
        with self._under_way():
            for work in self._works:
                work.wait()

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._unfinished.append(self._tensors)
            raise PeersLostError(_text(error)) from error


class NcclTransport(RowTransport):
    """NCCL's own collectives, on pieces padded to the largest with zeros. IT HAS NEVER RUN ON A GPU.

    Sums are NCCL's: its order, in the dtype of ``x``; addends join before, in this rank's own part of its piece.
    """

    name = "NCCL"

    def __init__(self, store: Any, me: int, size: int, host: Transport) -> None:
        super().__init__(me, size)
        self._host = host
        nccl = dist.ProcessGroupNCCL  # only builds for CUDA have it
        self._group: Any = nccl(store, me, size, nccl.Options())

    @property
    def host(self) -> Transport:
        return self._host

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


def viewed(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """The memory of a contiguous matrix as another dtype; also of no columns, which ``view`` does not take."""
    return x.view(-1).view(dtype).view(x.shape[0], width)


def _text(error: RuntimeError) -> str:
    """The first line of torch's message, without the line of its sources."""
    line = str(error).partition("\n")[0]
    return line.rpartition(".cc:")[2].partition("] ")[2] or line
