"""The transport of a group that lies on several hosts: shared memory within each, gloo between them.

Between two hosts each row travels once, whatever the number of ranks there. A host first sums its own members' rows;
each member then exchanges the part that it holds with those that hold the same rows elsewhere; what came is gathered in
the host. So a host of s members sends 1/s of what it would send if every member met every other.

A sum is taken host by host: float32 in rank order among a host's members, rounded to ``x.dtype`` to travel; then
float32 over the hosts in their order, with this rank's addends, rounded once. It is the same for every row, on every
rank, by every collective; in bf16 its bits differ from those of one host, and in float32 too (another order).

Legend: T rows in total, W columns; ``counts[i]`` rows of member i, T = sum(counts); ``me`` this rank's index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from narrows.comm.buffers import Buffers
from narrows.comm.process_groups import GlooTransport, RowTransport, viewed
from narrows.comm.segment import Segment
from narrows.comm.sums import sum_rows
from narrows.layout import split_evenly, starts

__all__ = ["Alone", "HierarchicalTransport", "Within"]

_SMALL = 1 << 16
"""Bytes up to which more than two hosts send each other their whole sums, to save one of the two exchanges."""
_KEPT = 1 << 10

Span = tuple[int, int]


class Within(Protocol):
    """The members of one host, seen from one of them: ``me`` among ``size``."""

    me: int
    size: int

    def gather_into(self, xs: Sequence[Tensor], counts: Sequence[tuple[int, ...]], out: Sequence[Tensor]) -> None:
        """The rows of all members of several matrices, each with its own counts, into contiguous ``out``."""
        ...

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        """As :meth:`Transport.reduce`."""
        ...


class Alone:
    """A host with a single member."""

    def __init__(self) -> None:
        self.me, self.size = 0, 1

    def gather_into(self, xs: Sequence[Tensor], counts: Sequence[tuple[int, ...]], out: Sequence[Tensor]) -> None:
        for x, into in zip(xs, out, strict=True):
            into.copy_(x)

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        return sum_rows([x], 0, x.shape[0], addends) if addends else x.contiguous()


class _Piece(NamedTuple):
    """Rows of a part that travel to or from one peer: ``start .. stop - 1`` of it."""

    peer: int
    start: int
    stop: int


class _Block(NamedTuple):
    """The rows of one host's members, and what this rank has to do with them.

    ``split``: how many of them each member of THIS host holds: its own rows in its own block, an even share of
    another's. ``num_mine``: how many this rank holds. ``with_owners``: parts of those, by the member that they belong
    to; of the own block none.
    """

    start: int
    stop: int
    split: tuple[int, ...]
    num_mine: int
    with_owners: tuple[_Piece, ...]


class _Way(NamedTuple):
    """A gather or reduce-scatter of some counts. ``blocks``: of every host. ``with_holders``: by host, the parts of
    this rank's own rows that its members hold."""

    blocks: tuple[_Block, ...]
    with_holders: tuple[tuple[_Piece, ...], ...]


class HierarchicalTransport(RowTransport):
    """One group's exchanges in two levels, seen from one of its ranks.

    Args:
        sizes: members per host. A host's members lie one after the other in the group.
        host: the number of this rank's host.
        within: this host's members.
        network: all members.
        segment: memory that peers of this host read where it lies.
    """

    name = "shared memory within hosts, and gloo over TCP between them"

    def __init__(
        self, sizes: tuple[int, ...], host: int, within: Within, network: GlooTransport, segment: Segment
    ) -> None:
        super().__init__(network.me, network.size)
        assert len(sizes) > 1 and sum(sizes) == self.size and sizes[host] == within.size, f"{sizes}, host {host}"
        self._sizes, self._host, self._within = sizes, host, within
        self._network, self._segment, self._buffers = network, segment, Buffers()
        first = sum(sizes[:host])
        # Each host begins with another one.
        self._others = [(host + step) % len(sizes) for step in range(1, len(sizes))]
        assert first + within.me == self.me

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        total, width = sum(counts), math.prod(x.shape[1:]) * x.itemsize
        out = self._segment.result((total, *x.shape[1:]), x.dtype)
        if not out.numel():
            return out
        way = _way(self._sizes, self.me, tuple(counts))
        mine, messages = viewed(x.contiguous(), torch.uint8, width), self._network.messages()
        held = {i: self._segment.lend(way.blocks[i].num_mine, width, torch.uint8) for i in self._others}
        for host in self._others:
            for peer, start, stop in way.blocks[host].with_owners:
                messages.receive(peer, held[host][start:stop])
        for host in self._others:
            for peer, start, stop in way.with_holders[host]:
                messages.send(peer, mine[start:stop])
        messages.wait()
        brought = [held.get(host, mine) for host in range(len(self._sizes))]
        into = viewed(out, torch.uint8, width)
        parts = [into[block.start : block.stop] for block in way.blocks]
        self._within.gather_into(brought, [block.split for block in way.blocks], parts)
        self._segment.give_back(list(held.values()))
        return out

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        if whole and not addends and (len(self._sizes) == 2 or x.nbytes <= _SMALL):
            return self._reduce_all(x)
        total = self._reduce_scatter(x, counts, addends)
        return self.gather(total, counts) if whole else total

    def _reduce_scatter(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor]) -> Tensor:
        """Each host sums the rows of every other host's members and sends them there; its own last, meanwhile."""
        width, messages = x.shape[1], self._network.messages()
        way, rows = _way(self._sizes, self.me, tuple(counts)), counts[self.me]
        parts = [self._buffers.lend(rows, width, x.dtype) for _ in self._sizes]
        for host in self._others:
            for peer, start, stop in way.with_holders[host]:
                messages.receive(peer, parts[host][start:stop])
        for host in (*self._others, self._host):
            block = way.blocks[host]
            if block.start == block.stop:
                continue
            summed = self._within.reduce(x[block.start : block.stop], block.split, (), False)
            if host == self._host:
                parts[host], lent = summed, parts[host]
                self._buffers.give_back((lent,))
            for peer, start, stop in block.with_owners:
                messages.send(peer, summed[start:stop])
        messages.wait()
        total = sum_rows(parts, 0, rows, addends)
        self._buffers.give_back(parts)
        return total

    def _reduce_all(self, x: Tensor) -> Tensor:
        """Each member sums an even share of all rows for its host, adds what the other hosts have for these, and
        gathers the rest: one exchange between hosts, and the same bits as a reduce-scatter and a gather."""
        rows, width = x.shape
        out = self._segment.result((rows, width), x.dtype)
        if not out.numel():
            return out
        split, pieces = _shares(self._sizes, self.me, rows)
        own = split[self._within.me]
        summed = self._within.reduce(x, split, (), False)
        parts, messages = [summed] * len(self._sizes), self._network.messages()
        for host in self._others:
            parts[host] = self._buffers.lend(own, width, x.dtype)
            for peer, start, stop in pieces[host]:
                messages.receive(peer, parts[host][start:stop])
        for host in self._others:
            for peer, start, stop in pieces[host]:
                messages.send(peer, summed[start:stop])
        messages.wait()
        total = self._segment.lend(own, width, x.dtype)
        if len(parts) == 2:  # the same bits in one pass: torch adds in float32 and rounds once
            torch.add(*parts, out=total)
        else:
            total.copy_(sum_rows(parts, 0, own))
        self._buffers.give_back(parts)
        self._within.gather_into([total], [split], [out])
        self._segment.give_back((total,))
        return out


def _overlaps(span: Span, others: Sequence[Span], first: int) -> Iterator[_Piece]:
    """The parts of ``span`` that lie in ``others``, counted from its start; ``first``: the peer of the first one."""
    for peer, (start, stop) in enumerate(others, first):
        start, stop = max(start, span[0]), min(stop, span[1])
        if start < stop:
            yield _Piece(peer, start - span[0], stop - span[0])


@lru_cache(_KEPT)
def _way(sizes: tuple[int, ...], me: int, counts: tuple[int, ...]) -> _Way:
    """What member ``me`` does in a gather or reduce-scatter of ``counts`` rows on hosts of ``sizes`` members."""
    members, rows = starts(sizes), starts(counts)
    host = next(i for i, (first, stop) in enumerate(members) if first <= me < stop)
    index = me - members[host][0]
    here = rows[members[host][0]][0], rows[members[host][1] - 1][1]
    blocks, with_holders = [], []
    for other, (first, stop) in enumerate(members):
        start, end = rows[first][0], rows[stop - 1][1]
        split = counts[first:stop] if other == host else split_evenly(end - start, sizes[host])
        held = _moved(starts(split)[index], start)
        with_owners = () if other == host else tuple(_overlaps(held, rows[first:stop], first))
        blocks.append(_Block(start, end, split, held[1] - held[0], with_owners))
        shares = [_moved(span, here[0]) for span in starts(split_evenly(here[1] - here[0], sizes[other]))]
        with_holders.append(() if other == host else tuple(_overlaps(rows[me], shares, first)))
    return _Way(tuple(blocks), tuple(with_holders))


@lru_cache(_KEPT)
def _shares(sizes: tuple[int, ...], me: int, rows: int) -> tuple[tuple[int, ...], tuple[tuple[_Piece, ...], ...]]:
    """An even share of ``rows`` for each member of ``me``'s host; and by host the parts of this rank's share that its
    members have in theirs."""
    members = starts(sizes)
    host = next(i for i, (first, stop) in enumerate(members) if first <= me < stop)
    split = split_evenly(rows, sizes[host])
    mine = starts(split)[me - members[host][0]]
    pieces = (
        tuple(_overlaps(mine, starts(split_evenly(rows, sizes[other])), first))
        for other, (first, _) in enumerate(members)
    )
    return split, tuple(pieces)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
