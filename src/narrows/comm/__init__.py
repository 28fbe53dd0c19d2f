"""Collectives: the World protocol, ranks as threads and as processes that keep it, and the moves of a plan bound to it.

The room moves and decides nothing. It imports `layout`, `errors` and torch only.
"""

from narrows.comm.dist_world import DistWorld
from narrows.comm.launch import Launch
from narrows.comm.movers import Geometry, Mover, assemble, scatter
from narrows.comm.processes import ProcessRanks
from narrows.comm.stamps import Stamp, mismatch
from narrows.comm.thread_world import ThreadWorld
from narrows.comm.threads import ThreadRanks, run_ranks
from narrows.comm.world import World

__all__ = [
    "DistWorld",
    "Geometry",
    "Launch",
    "Mover",
    "ProcessRanks",
    "Stamp",
    "ThreadRanks",
    "ThreadWorld",
    "World",
    "assemble",
    "mismatch",
    "run_ranks",
    "scatter",
]
