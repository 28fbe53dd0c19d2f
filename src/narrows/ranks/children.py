"""Rank processes of this host: started, and ended whatever state they are in.

Knows processes and signals; not what is said to them, except what they are told at birth.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

from narrows.ranks.messages import Contact
from narrows.ranks.rank_process import PROGRAM, told_to

__all__ = ["Children", "end_children", "ending", "spawn"]

Children = dict[int, subprocess.Popen[bytes]]
"""The processes by rank."""


def spawn(ranks: tuple[int, ...], node: int, contact: Contact, children: Children) -> None:
    """Starts a process per rank. They are born deaf to Ctrl-C and SIGTERM, which may be sent to all of us at once."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for place, rank in enumerate(ranks):
            command = [sys.executable, "-P", "-c", PROGRAM, f"narrows rank {rank}"]
            children[rank] = child = subprocess.Popen(command, stdin=subprocess.PIPE)
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(told_to(contact, rank, node, (place, len(ranks))).encode())
                child.stdin.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_children(children: Children, grace_s: float) -> None:
    """Waits for the processes to end; those that have not after ``grace_s`` are killed, stopped or not."""
    for kill in (False, True):
        left = [child for child in children.values() if child.poll() is None]
        for child in left:
            if kill:
                child.kill()
        end = time.monotonic() + grace_s
        for child in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))


def ending(child: subprocess.Popen[bytes]) -> str:
    """How a process has ended, as the end of a sentence."""
    code = child.returncode
    if code is not None and code < 0:
        name = next((known.name for known in signal.Signals if known == -code), "no name")
        return f"was killed by signal {-code} ({name})"
    return f"ended with exit code {code}"
