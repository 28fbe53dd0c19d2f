"""Child processes that are called over pipes: start, write, end; and returning free memory to the system.

The child processes import this file, so it imports next to nothing.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

__all__ = ["close", "give_back", "start", "write"]

_HEARD = {signal.SIGINT, signal.SIGTERM}
"""Sent to a whole process group; the process is born deaf to them, and ends when its stdin does."""


def start(program: str, title: str) -> subprocess.Popen[bytes]:
    """A new Python that runs ``program``; ``title`` is its name in lists of processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", program, title],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write(process: subprocess.Popen[bytes], *parts: bytes) -> None:
    """Write to it; that it has ended is seen when its answer is read."""
    assert process.stdin is not None, "its input is a pipe"
    try:
        for part in parts:
            process.stdin.write(part)
        process.stdin.flush()
    except (BrokenPipeError, ValueError):
        return


def close(process: subprocess.Popen[bytes] | None) -> None:
    """End it, if it runs, and close the connection to it."""
    if process is None:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue


def give_back() -> None:
    """Give free memory back now. Only glibc has a call for it; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
