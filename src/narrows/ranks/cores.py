"""What this host has for ranks: cores that this process may use, and GPUs; and which cores a rank gets for itself.

Knows the affinity of this process, and places of ranks on their host; not what is computed there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from narrows.comm.device import num_cards

__all__ = ["num_cores", "num_threads", "pin", "room", "share_of"]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_allowed())


def room(run_on: str) -> int:
    """Ranks that this host has a place for: a core or a GPU each."""
    return num_cores() if run_on == "cpu" else num_cards()


def num_threads(run_on: str, num_ranks: int) -> int:
    """Threads of each of ``num_ranks`` ranks on this host: their part of the cores; one where a GPU does the work."""
    return max(num_cores() // num_ranks, 1) if run_on == "cpu" else 1


def share_of(cores: Sequence[int], place: int, num_places: int, num_threads: int) -> tuple[int, ...]:
    """The cores of the rank that is number ``place`` of ``num_places``, with ``num_threads`` each.

    None unless all ranks together fill the cores: where there are fewer, ranks take turns; where there are more, others
    may be at work on the first ones too, and the system knows better who runs where.

    >>> share_of([0, 1, 4, 5], place=1, num_places=2, num_threads=2), share_of([0, 1, 4, 5], 0, 2, 1)
    ((4, 5), ())
    """
    if num_places * num_threads != len(cores):
        return ()
    return tuple(cores[place * num_threads : (place + 1) * num_threads])


def pin(place: int, num_places: int, num_threads: int) -> tuple[int, ...]:
    """Keep this thread, and those it starts, on its share of the cores; which those are, none if it is not pinned."""
    share = share_of(_allowed(), place, num_places, num_threads)
    if share:
        try:
            os.sched_setaffinity(0, share)
        except OSError:
            return ()
    return share


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # no Linux: nothing is pinned there
