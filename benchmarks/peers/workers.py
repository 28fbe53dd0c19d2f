"""A peer's worker process as the driver sees it: started, given work, put to sleep, watched for memory, ended.

Knows processes and JSON lines; not what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from narrows.calibrate.machine import proportional_memory

__all__ = ["PeerError", "Worker"]

SAMPLE_S = 0.25


class PeerError(Exception):
    """A peer cannot do a work."""


class Worker:
    """One peer. It sleeps (SIGSTOP) except while it works, so that no thread of it spins beside another's work.

    Args:
        can_sleep: whether it may be stopped; narrows' ranks watch each other, and wait without spinning.
    """

    def __init__(self, name: str, command: list[str], log: Path, *, can_sleep: bool, variables: dict[str, str]) -> None:
        self.name, self._can_sleep, self._log = name, can_sleep, log
        self.peak = 0
        self._file: IO[bytes] = log.open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            text=True,
            start_new_session=True,
            env=os.environ | variables,
        )

    def ask(self, prompts: list[list[int]], max_tokens: int, *, watch_memory: bool = False) -> dict[str, Any]:
        """The tokens and the times of a request.

        Raises:
            PeerError: it failed, or has ended.
        """
        self._signal(signal.SIGCONT)
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        if watch_memory:
            watcher.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            done.set()
        if watch_memory:
            watcher.join()
        if not line:
            raise PeerError(f"{self.name} has ended; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        self._signal(signal.SIGSTOP)
        return answer

    def cpu_seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        """CPU time of a request, of all threads: on a busy machine, time by the clock is of other work too."""
        before = _cpu_seconds(self._process.pid)
        self.ask(prompts, max_tokens, watch_memory=True)
        return _cpu_seconds(self._process.pid) - before

    def start_up(self, prompt: list[int]) -> float:
        """Seconds until the first token of a short prompt; to be called first, and at once."""
        start = perf_counter()
        self.ask([prompt], 1, watch_memory=True)
        return perf_counter() - start

    def close(self) -> None:
        """End it, and what it has started."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._file.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._can_sleep:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, number)

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(SAMPLE_S):
            self.peak = max(self.peak, proportional_memory(_family(self._process.pid)))


def _cpu_seconds(pid: int) -> float:
    """What a process and all that it has started have taken so far."""
    ticks = 0
    for member in _family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return ticks / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found
