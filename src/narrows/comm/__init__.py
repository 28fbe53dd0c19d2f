"""Collectives: the communicator among threads and among processes, and moves of a plan bound to it.

The room moves and decides nothing. It imports `layout`, `errors` and torch only.
"""

from narrows.comm.communicator import Communicator
from narrows.comm.dist_communicator import DistCommunicator
from narrows.comm.fingerprint import Fingerprint, mismatch
from narrows.comm.movers import Geometry, Mover, assemble, scatter
from narrows.comm.thread_communicator import ThreadCommunicator

__all__ = [
    "Communicator",
    "DistCommunicator",
    "Fingerprint",
    "Geometry",
    "Mover",
    "ThreadCommunicator",
    "assemble",
    "mismatch",
    "scatter",
]
