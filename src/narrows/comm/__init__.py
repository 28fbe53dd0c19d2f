"""Collectives: one communicator over four transports (and one that joins two of them), and the moves of a plan on it.

A communicator makes the collectives that a plan asks for, and decides nothing.
"""

from narrows.comm.communicator import Communicator
from narrows.comm.connect import connect_process, connect_thread
from narrows.comm.fingerprint import Fingerprint, mismatch
from narrows.comm.movers import Geometry, Mover, assemble, scatter

__all__ = [
    "Communicator",
    "Fingerprint",
    "Geometry",
    "Mover",
    "assemble",
    "connect_process",
    "connect_thread",
    "mismatch",
    "scatter",
]
