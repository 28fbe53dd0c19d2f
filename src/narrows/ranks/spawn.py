"""Starts rank processes on this host, and ends them whatever state they are in."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from typing import IO, NoReturn, Protocol

from narrows.ranks.copies import can_copy, copy
from narrows.ranks.messages import Contact
from narrows.ranks.rank_process import PROGRAM, boot, boot_line

__all__ = ["Doors", "Process", "Processes", "end_processes", "ending", "send_contact", "start"]


class Process(Protocol):
    """A child of this process: a ``subprocess.Popen``, or a copy of this one."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


Processes = dict[int, Process]
"""Processes by rank."""

Doors = dict[int, IO[bytes]]
"""By rank, where its process waits for its arguments; one whose file is closed without any ends."""


def start(ranks: tuple[int, ...], processes: Processes, *, copies: bool = False) -> Doors:
    """Starts one process per rank and adds it to ``processes``; they wait for :func:`send_contact`.

    Ctrl-C and SIGTERM are blocked in a new process until it ignores them: both may be sent to the whole process group.

    Args:
        copies: as copies of this process, if it has a single thread; else new interpreters import what they need.
    """
    doors: Doors = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        names = tuple(f"narrows rank {rank}" for rank in ranks)
        if copies and can_copy():
            for rank, (made, door) in zip(ranks, copy(names, _boot), strict=True):
                processes[rank], doors[rank] = made, door
            return doors
        for rank, name in zip(ranks, names, strict=True):
            new = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, name], stdin=subprocess.PIPE)
            assert new.stdin is not None
            processes[rank], doors[rank] = new, new.stdin
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return doors


def send_contact(doors: Doors, node: int, contact: Contact) -> None:
    """Gives the processes of :func:`start` their arguments."""
    for local_rank, (rank, door) in enumerate(doors.items()):
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen elsewhere
            door.write(boot_line(contact, rank, node, (local_rank, len(doors))).encode())
            door.close()


def _boot(line: bytes) -> NoReturn:
    boot(json.loads(line))


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


def ending(process: Process) -> str:
    """How a process has ended, as the end of a sentence."""
    code = process.returncode
    if code is not None and code < 0:
        name = next((known.name for known in signal.Signals if known == -code), "no name")
        return f"was killed by signal {-code} ({name})"
    return f"ended with exit code {code}"
