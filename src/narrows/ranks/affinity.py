"""Cores and GPUs of this host: how many ranks and threads it has room for, and which cores each rank is pinned to."""

from __future__ import annotations

import os
from collections.abc import Sequence

from narrows.comm.device import num_gpus
from narrows.cost.environment import num_cores

__all__ = ["num_threads", "pin", "room", "share_of"]


def room(run_on: str) -> int:
    """How many ranks this host has room for: one per core or per GPU."""
    return num_cores() if run_on == "cpu" else num_gpus()


def num_threads(run_on: str, num_ranks: int) -> int:
    """Threads per rank for ``num_ranks`` ranks on this host: an equal part of the cores; one where a GPU computes."""
    return max(num_cores() // num_ranks, 1) if run_on == "cpu" else 1


def share_of(cores: Sequence[int], local_rank: int, local_world_size: int, num_threads: int) -> tuple[int, ...]:
    """The cores of rank ``local_rank`` of ``local_world_size`` on this host, ``num_threads`` per rank.

    Empty unless all ranks together use every core. With fewer cores, ranks take turns; with more, other processes may
    be busy on the first ones, and the system's scheduler knows better.

    >>> share_of([0, 1, 4, 5], local_rank=1, local_world_size=2, num_threads=2), share_of([0, 1, 4, 5], 0, 2, 1)
    ((4, 5), ())
    """
    if local_world_size * num_threads != len(cores):
        return ()
    return tuple(cores[local_rank * num_threads : (local_rank + 1) * num_threads])


def pin(local_rank: int, local_world_size: int, num_threads: int) -> tuple[int, ...]:
    """Pins this thread, and those it starts, to its share of the cores.

    Returns:
        the cores; empty if the thread is not pinned.
    """
    share = share_of(_allowed(), local_rank, local_world_size, num_threads)
    if share:
        try:
            os.sched_setaffinity(0, share)
        except OSError:
            return ()
    return share


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # not Linux: nothing is pinned
