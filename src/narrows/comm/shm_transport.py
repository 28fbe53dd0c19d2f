"""The transport among ranks of one host: they read each other's memory, and meet once per exchange.

The meeting, the copies and the sums are compiled (`shm_calls.py`, `csrc/runtime/collectives.cpp`).

A rank's inputs must lie in its segment until all have read them. A send buffer lies there already, and so does a large
result of an earlier collective, which is the caller's again only when all have read it; anything else is copied there.
A reduce-scatter reads this rank's rows of every member. An all-reduce of few bytes reads all rows of every member and
meets once; one of many bytes is a reduce-scatter and a gather.

Legend: T rows in total, W columns; ``counts[i]`` rows of member i, T = sum(counts); ``me`` this rank's index.
"""

from __future__ import annotations

import ctypes
import math
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from narrows.comm.captured import CapturedCollectives
from narrows.comm.segment import Block
from narrows.comm.shm_calls import (
    DIFFERS,
    NOT_YET,
    STAGED_SMALL,
    SUMMED,
    Call,
    column_call,
    gather_call,
    numbers,
    reduce_call,
)
from narrows.comm.shm_peers import ShmPeers
from narrows.comm.sums import sum_rows
from narrows.comm.transport import DifferentCallsError, RowNorm, Transport
from narrows.errors import CollectiveMismatchError

__all__ = ["ShmTransport"]

_AT_ONCE = 1 << 15
"""Bytes up to which every member of an all-reduce sums all rows, to save a meeting."""
_COPIED = 1 << 16
"""Bytes up to which an input that lies in the segment is copied all the same: that is faster than to wait for all."""

_NORMED = frozenset((torch.float32, torch.bfloat16))
_LINE = 64
"""A copied input begins at its own cache line."""


@cache
def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)


class ShmTransport(Transport):
    """One group's exchanges, seen from one of its ranks.

    Args:
        slot: the group's index among the groups of each member.
    """

    name = "shared memory"
    can_replay = True

    def __init__(self, peers: ShmPeers, ranks: tuple[int, ...], slot: int) -> None:
        super().__init__(ranks.index(peers.rank), len(ranks))
        self.number = 0
        """Of complete exchanges."""
        self._ranks, self._peers = ranks, peers
        self._segment, self._functions = peers.segment, peers.functions
        self._limits = peers.functions.limits
        assert slot < self._limits.max_groups, f"a rank in more than {self._limits.max_groups} groups"
        self._segments = numbers(*peers.starts(ranks))
        address = (len(peers.segment.map), ctypes.addressof(self._segments))
        self._endpoint = numbers(self.size, self.me, slot, *address, 0, 0)
        assert ctypes.sizeof(self._endpoint) == self._limits.endpoint_bytes, "the library is of other sources"
        self._args = numbers(*(0,) * (3 * self._limits.max_fields + 2))
        self._addresses = ctypes.addressof(self._endpoint), ctypes.addressof(self._args)
        self._captured: CapturedCollectives | None = None

    def gather_fields(self, xs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        total, counts = sum(counts), tuple(counts)
        out = [self._segment.result((total, *x.shape[1:]), x.dtype) for x in xs]
        self.gather_into(xs, (counts,) * len(xs), out)
        return out

    def gather_into(self, xs: Sequence[Tensor], counts: Sequence[tuple[int, ...]], out: Sequence[Tensor]) -> None:
        """The rows of all members of several matrices, each with its own counts, into contiguous ``out``."""
        most = self._limits.max_fields
        if len(xs) > most:
            self.gather_into(xs[:most], counts[:most], out[:most])
            self.gather_into(xs[most:], counts[most:], out[most:])
            return
        call = gather_call(self.me, tuple(counts), tuple([math.prod(x.shape[1:]) * x.itemsize for x in xs]))
        must_wait = self._place_inputs(xs, call, 3)
        for at, result in enumerate(out):
            self._args[3 * at + 2] = result.data_ptr()
        self._args[3 * len(out)] = must_wait
        self._meet(self._functions.gather, call)

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        call = column_call(self.me, tuple(widths), x.shape[0], x.itemsize)
        must_wait = self._place_inputs((x,), call, 3)
        out = self._segment.result((x.shape[0], call.size), x.dtype)
        self._args[2], self._args[3] = out.data_ptr(), must_wait
        self._meet(self._functions.gather, call)
        return out

    def reduce(self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], whole: bool) -> Tensor:
        counts, kinds = tuple(counts), tuple([addend.dtype for addend in addends])
        most = self._limits.max_fields
        if x.dtype not in SUMMED or not SUMMED.issuperset(kinds) or len(kinds) >= most:
            return self._reduce_uncommon(x, counts, addends, whole)
        at_once = whole and x.nbytes <= _AT_ONCE
        call = reduce_call(self.me, counts, x.shape[1], x.dtype, kinds, at_once, whole and not at_once, most)
        if at_once:
            out = torch.empty(x.shape, dtype=x.dtype)
            self._sum(call, x, addends, out)
            return out
        shape = (counts[self.me], x.shape[1])
        if not whole:
            out = self._segment.result(shape, x.dtype)
            self._sum(call, x, addends, out)
            return out
        return self._reduce_and_gather(call, x, counts, addends, shape)

    def can_reduce_norm(self, x: Tensor, addends: Sequence[Tensor], norm: RowNorm) -> bool:
        """Sums that every member makes whole, of a dtype for which the norms are compiled."""
        return (
            x.nbytes <= _AT_ONCE
            and x.dtype == norm.weight_W.dtype
            and x.dtype in _NORMED
            and SUMMED.issuperset([addend.dtype for addend in addends])
            and len(addends) + 1 < self._limits.max_fields // 2
        )

    def reduce_norm(
        self, x: Tensor, counts: Sequence[int], addends: Sequence[Tensor], norm: RowNorm
    ) -> tuple[Tensor, Tensor]:
        kinds = tuple([addend.dtype for addend in addends])
        rows, width = x.shape
        call = reduce_call(self.me, tuple(counts), width, x.dtype, kinds, True, False, self._limits.max_fields)
        must_wait = self._place_inputs((x, *addends), call, 2)
        summed, normed = torch.empty((rows, width), dtype=x.dtype), torch.empty((rows, width), dtype=x.dtype)
        weight_W, eps, residual_TW = norm
        residual = 0
        if residual_TW is not None:
            residual_TW = residual_TW.contiguous()
            assert residual_TW.shape == x.shape and residual_TW.dtype == x.dtype, "a residual of another shape"
            residual = residual_TW.data_ptr()
        end = 2 + 2 * len(addends)
        more = (summed.data_ptr(), must_wait, residual, weight_W.data_ptr(), normed.data_ptr(), rows, width, _bits(eps))
        for at, value in enumerate(more, end):
            self._args[at] = value
        self._meet(self._functions.reduce_norm, call)
        return normed, summed

    def _reduce_and_gather(
        self, call: Call, x: Tensor, counts: tuple[int, ...], addends: Sequence[Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """All rows: this rank's are summed where the others read them, and then gathered."""
        nbytes = math.prod(shape) * x.itemsize
        block = self._take(max(1, nbytes), self.number + 2)
        piece = block.as_tensor(shape, x.dtype) if nbytes else x.new_empty(shape)
        self._sum(call, x, addends, piece)
        call = gather_call(self.me, (counts,), (x.shape[1] * x.itemsize,))
        out = self._segment.result((call.size, x.shape[1]), x.dtype)
        self._args[0], self._args[1] = piece.data_ptr(), 0 if nbytes else STAGED_SMALL
        self._args[2], self._args[3] = out.data_ptr(), False
        self._meet(self._functions.gather, call)
        return out

    def _sum(self, call: Call, x: Tensor, addends: Sequence[Tensor], out: Tensor) -> None:
        must_wait = self._place_inputs((x, *addends), call, 2)
        end = 2 + 2 * len(addends)
        self._args[end], self._args[end + 1] = out.data_ptr(), must_wait
        self._meet(self._functions.reduce, call)

    def _reduce_uncommon(self, x: Tensor, counts: tuple[int, ...], addends: Sequence[Tensor], whole: bool) -> Tensor:
        """Sums of dtypes or numbers of addends that are not compiled: torch takes them, from a copy of everything."""
        rows = x.shape[0]
        parts = self.gather(x, (rows,) * self.size).view(self.size, *x.shape).unbind()
        piece = sum_rows(parts, sum(counts[: self.me]), counts[self.me], addends)
        return self.gather(piece, counts) if whole else piece

    def _place_inputs(self, xs: Sequence[Tensor], call: Call, stride: int) -> bool:
        """Writes into the arguments where the inputs lie, and where they are copied if that is not in the segment.

        Returns:
            whether the caller must wait until all have read, since an earlier result is read where it lies.
        """
        args, segment, room, must_wait = self._args, self._segment, self._limits.small_bytes, False
        for at, x in enumerate(xs):
            start, nbytes, stage = x.data_ptr(), call.nbytes[at], 0
            if x.nbytes != nbytes:
                raise CollectiveMismatchError(f"a tensor of {tuple(x.shape)} {x.dtype} does not fit the counts")
            if not x.is_contiguous():
                block = self._take(nbytes, self.number + 1)
                block.as_tensor(tuple(x.shape), x.dtype).copy_(x)
                start = block.start
            elif at < call.travels:
                lent = segment.holds(start) and segment.is_lent(x)
                if nbytes and (lent or (nbytes > _COPIED and segment.holds(start))):
                    must_wait |= not lent
                elif nbytes <= room - _LINE:
                    stage = STAGED_SMALL
                    room -= nbytes + _LINE
                else:
                    stage = self._take(nbytes, self.number + 1).start
            args[stride * at], args[stride * at + 1] = start, stage
        return must_wait

    def _take(self, nbytes: int, exchange: int) -> Block:
        """A block that is read in that exchange of this group, and free again when all have read."""
        block = self._segment.take(nbytes)
        block.after = (self, exchange)
        return block

    def _meet(self, function: Callable[[int, int, int], int], call: Call) -> None:
        """Comes to the next exchange.

        Raises:
            PeersLostError: a member has ended. DifferentCallsError: one came to another call.
        """
        endpoint, args = self._addresses
        if self._captured is not None:
            self._captured.exchange(self)
        while (outcome := function(endpoint, call.address, args)) == NOT_YET:
            self._peers.check(self._ranks)
        self.advance()
        if outcome == DIFFERS:
            raise DifferentCallsError

    # --- captured steps

    def advance(self) -> None:
        """Count one more exchange as complete."""
        self.number += 1
        self._segment.latest = (self, self.number)

    def capture(self, into: CapturedCollectives | None) -> None:
        self._captured = into
        self._segment.noted = None if into is None else into.blocks

    def resume(self, outcome: int) -> None:
        if outcome == DIFFERS:
            raise DifferentCallsError
        self._peers.check(self._ranks)
