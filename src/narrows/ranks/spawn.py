"""Starts rank processes on this host, and ends them whatever state they are in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

from narrows.ranks.messages import Contact
from narrows.ranks.rank_process import PROGRAM, boot_line

__all__ = ["Processes", "end_processes", "ending", "spawn"]

Processes = dict[int, subprocess.Popen[bytes]]
"""Processes by rank."""


def spawn(ranks: tuple[int, ...], node: int, contact: Contact, processes: Processes) -> None:
    """Starts one process per rank and adds it to ``processes``.

    Ctrl-C and SIGTERM are blocked in a new process until it ignores them: both may be sent to the whole process group.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for local_rank, rank in enumerate(ranks):
            command = [sys.executable, "-P", "-c", PROGRAM, f"narrows rank {rank}"]
            processes[rank] = process = subprocess.Popen(command, stdin=subprocess.PIPE)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(boot_line(contact, rank, node, (local_rank, len(ranks))).encode())
                process.stdin.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_processes(processes: Processes, grace_s: float) -> None:
    """Waits ``grace_s`` for the processes to end, then kills those that are left; SIGKILL ends stopped ones too."""
    for kill in (False, True):
        left = [process for process in processes.values() if process.poll() is None]
        for process in left:
            if kill:
                process.kill()
        end = time.monotonic() + grace_s
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


def ending(process: subprocess.Popen[bytes]) -> str:
    """How a process has ended, as the end of a sentence."""
    code = process.returncode
    if code is not None and code < 0:
        name = next((known.name for known in signal.Signals if known == -code), "no name")
        return f"was killed by signal {-code} ({name})"
    return f"ended with exit code {code}"
