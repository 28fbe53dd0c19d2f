"""Collectives: the World protocol, worlds of threads and of processes that keep it, and moves of a plan bound to it.

The room moves and decides nothing. It imports `layout`, `errors` and torch only.
"""

from narrows.comm.dist_world import DistWorld
from narrows.comm.movers import Geometry, Mover, assemble, scatter
from narrows.comm.stamps import Stamp, mismatch
from narrows.comm.thread_world import ThreadWorld
from narrows.comm.world import World

__all__ = [
    "DistWorld",
    "Geometry",
    "Mover",
    "Stamp",
    "ThreadWorld",
    "World",
    "assemble",
    "mismatch",
    "scatter",
]
