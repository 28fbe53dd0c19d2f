"""Starts rank processes on this host, and ends them whatever state they are in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Protocol

from narrows.ranks.fork_server import UNKNOWN_CODE, fork_server, signals_blocked
from narrows.ranks.messages import Contact
from narrows.ranks.rank_process import PROGRAM, boot_line

__all__ = ["Doors", "Process", "Processes", "end_processes", "ending", "send_contact", "start"]


class Process(Protocol):
    """A ``subprocess.Popen``, or a rank that a fork server has made."""

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


def start(
    ranks: Sequence[int],
    processes: Processes,
    *,
    forked: bool = False,
    fork_self: bool = False,
    modules: Sequence[str] = (),
) -> Doors:
    """Starts one process per rank and adds it to ``processes``; they wait for :func:`send_contact`.

    Args:
        forked: by the fork server of this process, where the system has what it needs; else, and without it, each is a
            new interpreter, which imports what it needs.
        fork_self: the fork server may be a fork of this process.
        modules: what the ranks will import.

    Raises:
        RankError: the fork server does not answer.
    """
    names = tuple(f"narrows rank {rank}" for rank in ranks)
    server = fork_server(fork_self=fork_self) if forked else None
    made = _started(names) if server is None else server.fork(names, modules)
    for rank, (process, _) in zip(ranks, made, strict=True):
        processes[rank] = process
    return {rank: door for rank, (_, door) in zip(ranks, made, strict=True)}


def _started(names: Sequence[str]) -> list[tuple[Process, IO[bytes]]]:
    made: list[tuple[Process, IO[bytes]]] = []
    with signals_blocked():
        for name in names:
            new = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, name], stdin=subprocess.PIPE)
            assert new.stdin is not None
            made.append((new, new.stdin))
    return made


def send_contact(doors: Doors, node: int, contact: Contact) -> None:
    """Gives the processes of :func:`start` their arguments."""
    for local_rank, (rank, door) in enumerate(doors.items()):
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen elsewhere
            door.write(boot_line(contact, rank, node, (local_rank, len(doors))).encode())
            door.close()


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
    if code == UNKNOWN_CODE:
        return "ended after the process that forks ranks, so its exit code is not known"
    if code is not None and code < 0:
        name = next((known.name for known in signal.Signals if known == -code), "no name")
        return f"was killed by signal {-code} ({name})"
    return f"ended with exit code {code}"
