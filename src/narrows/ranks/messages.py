"""What the host of the ranks and the ranks say to each other: the kinds of messages, and what each carries.

Knows plain values only. The host is the process that hands out calls; a node is a process that started ranks on another
host and ends them. Ranks and nodes beat; one that is silent for too long (`timing.py`) is taken for gone. The host does
not beat: Python work could silence it for longer than that (one C call that keeps the interpreter's lock). Ranks and
nodes learn from their connection that the host's process has ended or that its machine does not answer.
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
    "Setup",
    "hello",
]

HELLO = b"h"  # rank or node -> host, once: Hello
SETUP = b"s"  # host -> rank, once: Setup
KEEP = b"k"  # host -> rank: an object that later calls mention by number
CALL = b"c"  # host -> rank: (method or None, args, kwargs, rank 0 alone answers); None makes the worker; from 0 on
DONE = b"d"  # rank -> host: (number of the call, result)
FAILED = b"f"  # rank -> host: Failure
BEAT = b"b"  # rank -> host: Report; node -> host: nothing
END = b"e"  # host -> all: (exit code, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Where the host listens, the key that proves who belongs to it, and the durations that it goes by."""

    address: str
    port: int
    key: bytes
    timing: Timing = TIMING


class Hello(NamedTuple):
    """Who connects: a rank, or a node (``rank`` None)."""

    rank: int | None
    node: int
    pid: int
    host: str
    versions: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a rank needs to know before its first call. The store is where the ranks find each other."""

    mesh: Mesh
    checked: bool
    num_threads: int
    device: str
    store_address: str
    store_port: int
    prefix: str


class Failure(NamedTuple):
    """A call that raised. ``error`` is it pickled, if that can be undone. ``lost``: a peer of the rank went away,
    and this is the collective that the rank was in."""

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
