"""The messages between the coordinator and its ranks and nodes: their kinds and contents.

The coordinator is the process that hands out calls. A node is a process that starts and ends the ranks of another host.
Ranks and nodes send heartbeats; one that stays silent too long (`timing.py`) is taken for dead. The coordinator sends
none: one C call that keeps the interpreter's lock could silence it for longer than that. If its process ends or its
machine no longer answers, ranks and nodes learn it from their connection.
"""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from narrows.layout import Mesh
from narrows.ranks.timing import TIMING, Timing

__all__ = [
    "BEAT",
    "CALL",
    "DONE",
    "END",
    "FAILED",
    "HELLO",
    "KEEP",
    "SETUP",
    "Contact",
    "Failure",
    "Hello",
    "Made",
    "Setup",
    "hello",
]

HELLO = b"h"  # rank or node -> coordinator, once: Hello
SETUP = b"s"  # coordinator -> rank, once: Setup
KEEP = b"k"  # coordinator -> rank: an object that later calls mention by number
CALL = b"c"  # coordinator -> rank: (method, or None to make the worker; args; kwargs; whether rank 0 alone answers)
DONE = b"d"  # rank -> coordinator: (number of the call, from 0 on; result)
FAILED = b"f"  # rank or node -> coordinator: Failure
BEAT = b"b"  # rank -> coordinator: Report; node -> coordinator: nothing
END = b"e"  # coordinator -> all: (exit code, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Where the coordinator listens, the key that its ranks and nodes prove, and the timing that all of them use."""

    address: str
    port: int
    key: bytes
    timing: Timing = TIMING


class Hello(NamedTuple):
    """The first message of a rank, or of a node (``rank`` None)."""

    rank: int | None
    node: int
    pid: int
    host: str
    versions: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a rank needs before its first call. Ranks find each other through the store."""

    mesh: Mesh
    checked: bool
    num_threads: int
    device: str
    store_address: str
    store_port: int
    prefix: str


class Made(NamedTuple):
    """What the first call, which makes the worker, is answered with: how collectives travel, and the seconds that it
    took to meet the other ranks, and to make the worker."""

    transport: str
    met_s: float
    made_s: float


class Failure(NamedTuple):
    """A call that raised. ``error``: the exception pickled, if it can be unpickled. ``lost``: if the rank lost a peer,
    the collective that it was in."""

    call: int
    error: bytes | None
    name: str
    text: str
    trace: str
    lost: str = ""


def hello(rank: int | None, node: int, pid: int) -> Hello:
    """This process's greeting."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "narrows"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return Hello(rank, node, pid, socket.gethostname(), ", ".join(versions))
