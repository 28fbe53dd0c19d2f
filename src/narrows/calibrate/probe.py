"""What a rank does to find out what the machine allows, and what its collectives cost. Runs on ranks.

Every measurement starts on all ranks together, after a barrier, since cores share memory: what one rank reaches alone
says nothing of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from narrows.comm.communicator import Communicator
from narrows.comm.device import synchronize
from narrows.layout import split_evenly
from narrows.ops.linear import linear
from narrows.ops.packed import LinearWeight, empty_linear, fill

__all__ = ["GEMM_SHAPE", "PROBED_COLLECTIVES", "Probe"]

PROBED_COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
GEMM_SHAPE = (2048, 4096, 2048)
"""Rows, outputs and inputs of the product that stands for the fastest one: 34 GFLOP per rank."""

_WIDTH = 512
_TRIAL_ROWS = 256
_PASSES = 3
"""How often a rate is measured at once; the fastest counts, since other work only ever takes time away."""

Made = TypeVar("Made")


class Probe:
    """One rank's part in measurements; every method is called on all ranks together, and gives seconds."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._ranks = tuple(range(comm.mesh.size))
        self._kept: dict[str, tuple[object, Any]] = {}

    def read(self, nbytes: int) -> float:
        """To read ``nbytes`` once, in a sum over them."""
        (x,) = self._keep("read", nbytes, lambda: (torch.ones(nbytes // 4, device=self.comm.device),))
        return self._fastest(lambda: x.sum())

    def gemm(self, dtype: torch.dtype) -> float:
        """To compute one product of :data:`GEMM_SHAPE`, by torch or by the engine's kernel on packed weights: whichever
        is faster on some of the rows."""
        rows, outputs, inputs = GEMM_SHAPE
        device = self.comm.device

        def make() -> tuple[Tensor, LinearWeight]:
            x, plain = (torch.randn(size, device=device).to(dtype) for size in ((rows, inputs), (outputs, inputs)))
            packed = empty_linear(outputs, inputs, dtype, device)
            fill(packed, 0, plain)
            return x, min((plain, packed), key=lambda weight: self._seconds(lambda: linear(x[:_TRIAL_ROWS], weight)))

        x, weight = self._keep("gemm", dtype, make)
        return self._fastest(lambda: linear(x, weight))

    def copy(self, nbytes: int, repeats: int) -> float:
        """To copy ``nbytes``: the mean of ``repeats`` copies from different addresses to one, as results have one."""
        kept = self._keep(
            "copy",
            (nbytes, repeats),
            lambda: tuple(
                torch.ones(max(nbytes, 1), dtype=torch.uint8, device=self.comm.device) for _ in range(repeats + 1)
            ),
        )
        *sources, to = kept
        for source in sources:
            source.fill_(1)
        return self._mean([partial(to.copy_, source) for source in sources])

    def collective(self, op: str, nbytes: int, dtype: torch.dtype, repeats: int) -> float:
        """Mean seconds of ``repeats`` calls of one of :data:`PROBED_COLLECTIVES` over ``[T, W]`` of ``nbytes`` in all.

        What is brought lies where this communicator sends from, and has just been written, as a stage leaves it.
        """
        return self._exchange(op, self._ranks, self._rows(nbytes, dtype), dtype, repeats)

    def exchange(
        self, op: str, axes: tuple[int, int], nbytes: int, dtype: torch.dtype, repeats: int, levels: bool = False
    ) -> float:
        """As :meth:`collective`, among the ranks along these axes of the mesh, all such groups at once, and also a
        ``column_gather``; what is gathered lies in its own memory, as a row stage leaves it. ``levels``: in hosts
        and between them."""
        ranks = self.comm.mesh.group(self.comm.rank, *axes)
        rows = max(1, round(nbytes / (_WIDTH * dtype.itemsize)))
        lent = op in ("all_reduce", "reduce_scatter")
        return self._exchange(op, ranks, rows, dtype, repeats, lent=lent, levels=levels)

    def _exchange(
        self,
        op: str,
        ranks: tuple[int, ...],
        rows: int,
        dtype: torch.dtype,
        repeats: int,
        *,
        lent: bool = True,
        levels: bool = False,
    ) -> float:
        counts, me = split_evenly(rows, len(ranks)), ranks.index(self.comm.rank)
        widths = split_evenly(_WIDTH, len(ranks)) if op == "column_gather" else (_WIDTH,) * len(ranks)
        shape = counts[me] if op == "all_gather" else rows, widths[me]

        def brought() -> Tensor:
            return (self.comm.send_buffer(*shape, dtype) if lent else torch.empty(shape, dtype=dtype)).fill_(1)

        def call(x: Tensor) -> object:
            if op == "all_gather":
                return self.comm.all_gather([x], ranks, counts, "bench", levels=levels)
            if op == "column_gather":
                return self.comm.column_gather(x, ranks, widths, "bench", levels=levels)
            return getattr(self.comm, op)(x, ranks, counts, "bench", levels=levels)

        return self._mean([partial(call, x) for x in [brought() for _ in range(repeats)]])

    def add(self, nbytes: int, repeats: int) -> float:
        """To add two tensors into a new one: ``nbytes`` read and written in all; the mean of ``repeats``."""
        size = max(nbytes // 6, 1)
        a, b = (torch.ones(size, dtype=torch.bfloat16, device=self.comm.device) for _ in range(2))
        return self._mean([lambda: a + b] * repeats)

    def join_gloo(self, file: str) -> None:
        """Meet the other ranks in ``torch.distributed``'s own gloo group, through a file that all can reach."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=self.comm.rank, world_size=len(self._ranks))

    def gloo(self, op: str, nbytes: int, dtype: torch.dtype, repeats: int) -> float:
        """As :meth:`collective`, by the function of ``torch.distributed`` of the same purpose."""
        rows, size = self._rows(nbytes, dtype), len(self._ranks)
        whole = [torch.ones(rows, _WIDTH, dtype=dtype) for _ in range(repeats)]
        pieces = [torch.ones(rows // size, _WIDTH, dtype=dtype) for _ in range(repeats)]
        calls: dict[str, Callable[[Tensor, Tensor], object]] = {
            "all_reduce": lambda full, piece: dist.all_reduce(full),
            "reduce_scatter": lambda full, piece: dist.reduce_scatter_single(piece, full),
            "all_gather": lambda full, piece: dist.all_gather_single(full, piece),
        }
        return self._mean([partial(calls[op], full, piece) for full, piece in zip(whole, pieces, strict=True)])

    def _rows(self, nbytes: int, dtype: torch.dtype) -> int:
        """Rows of about ``nbytes``, as many for each rank, since gloo wants equal pieces."""
        size = len(self._ranks)
        return size * max(1, round(nbytes / (size * _WIDTH * dtype.itemsize)))

    def _keep(self, what: str, size: object, make: Callable[[], Made]) -> Made:
        """What was made for this size; another size makes it again."""
        if what not in self._kept or self._kept[what][0] != size:
            self._kept[what] = size, make()
        made: Made = self._kept[what][1]
        return made

    def _mean(self, calls: list[Callable[[], object]]) -> float:
        self.comm.barrier(self._ranks, "bench")
        return self._seconds(*calls) / len(calls)

    def _seconds(self, *calls: Callable[[], object]) -> float:
        """Of all calls together, on this rank."""
        synchronize(self.comm.device)
        start = perf_counter()
        for call in calls:
            call()
        synchronize(self.comm.device)
        return perf_counter() - start

    def _fastest(self, call: Callable[[], object]) -> float:
        return min(self._mean([call]) for _ in range(_PASSES))
