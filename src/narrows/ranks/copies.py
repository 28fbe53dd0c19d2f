"""Rank processes as copies of this one (fork): they start in milliseconds, with all that this process has imported.

A copy has only the thread that made it. Whatever other threads held (locks, the teams of OpenMP) would stay as it
was for good. So a process is copied only while it has a single thread, those of C libraries counted.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

__all__ = ["Copy", "can_copy", "copy"]

_LONGEST_NAP_S = 0.05


class Copy:
    """A copy of this process, with the part of ``subprocess.Popen`` that ranks need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._asking = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, a signal's number negated, or None while it lives."""
        with self._asking:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # other code has waited for all children of this process
                    self.returncode = 0
                else:
                    self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        end, nap = time.monotonic() + (float("inf") if timeout is None else timeout), 0.0005
        while (code := self.poll()) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            nap = min(2 * nap, left, _LONGEST_NAP_S)
            time.sleep(nap)
        return code

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def can_copy() -> bool:
    """Whether this process has a single thread, as the system counts them."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def copy(names: tuple[str, ...], run: Callable[[bytes], NoReturn]) -> list[tuple[Copy, IO[bytes]]]:
    """Makes a copy for each name. Each reads one line, which this process writes to the file beside it, and runs
    ``run`` with it; without a line it ends.

    The name is what the system shows for the process beside its command line.
    """
    assert can_copy(), "the caller asks first"
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # what is shared stays shared: a collection would write to it
    made: list[tuple[Copy, IO[bytes]]] = []
    for name in names:
        reads, writes = os.pipe()
        if not (pid := os.fork()):
            _be_a_copy(name, run, reads, (writes, *(door.fileno() for _, door in made)))
        os.close(reads)
        made.append((Copy(pid), os.fdopen(writes, "wb")))
    return made


def _be_a_copy(name: str, run: Callable[[bytes], NoReturn], reads: int, not_mine: tuple[int, ...]) -> NoReturn:
    try:
        for fd in not_mine:  # else the pipes would not end with the process that was copied
            os.close(fd)
        os.dup2(reads, 0)  # and not the user's terminal
        os.close(reads)
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(name, encoding="utf-8")
        with open(0, "rb", closefd=False) as stdin:
            if line := stdin.readline():
                run(line)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into what the copied process was doing
