"""Collectives: the World protocol, rank threads that keep it, and the moves of a plan bound to a world.

The room moves and decides nothing. It imports `layout`, `errors` and torch only.
"""

from narrows.comm.movers import Geometry, Mover, assemble, scatter
from narrows.comm.stamps import Stamp, mismatch
from narrows.comm.thread_world import ThreadWorld
from narrows.comm.threads import ThreadRanks, run_ranks
from narrows.comm.world import World

__all__ = [
    "Geometry",
    "Mover",
    "Stamp",
    "ThreadRanks",
    "ThreadWorld",
    "World",
    "assemble",
    "mismatch",
    "run_ranks",
    "scatter",
]
