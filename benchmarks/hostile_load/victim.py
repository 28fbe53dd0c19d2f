"""The server under attack as the machine sees it: its processes, their memory and time, and whether it is calm."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from soak import family, sample

__all__ = ["Victim", "start"]

_CALM_CORES = 0.25
"""What a server without requests may use of one core. Below it, nothing is compiled, warmed up or tokenized."""

_USUAL_DESCRIPTORS = 1024
_TICKS_PER_S = 100


class Victim:
    """A server that runs: its address, and its first process. ``process``: None if it was not started here."""

    def __init__(self, url: str, pid: int, process: subprocess.Popen[str] | None = None) -> None:
        self.url, self.pid, self.process = url, pid, process

    @property
    def is_alive(self) -> bool:
        """Whether its first process runs."""
        if self.process is not None:
            return self.process.poll() is None
        return Path(f"/proc/{self.pid}").exists()

    def memory_mb(self) -> float:
        """MB that its processes have for themselves; 0 when it is gone."""
        return sum(self._of_each(lambda pid: sample(pid)["mb"]))

    def num_restarts(self) -> int | None:
        """How often its ranks were replaced; None if it does not answer."""
        health = self._get("/health")
        return None if health is None else int(json.loads(health)["num_restarts"])

    def wait(self, patience_s: float) -> bool:
        """Wait until it has no requests and does nothing; whether it came to that in time."""
        end = time.monotonic() + patience_s
        quiet = 0
        while quiet < 2 and time.monotonic() < end and self.is_alive:
            before, began = self._cpu_s(), time.monotonic()
            time.sleep(0.3)
            cores = (self._cpu_s() - before) / (time.monotonic() - began)
            quiet = quiet + 1 if cores < _CALM_CORES and self._has_no_requests() else 0
        return quiet == 2

    def end(self) -> int:
        """End it, if it was started here; its exit code."""
        if self.process is None:
            return 0
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(10)
            except subprocess.TimeoutExpired:
                for pid in family(self.pid).values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        return self.process.wait(10)

    def _has_no_requests(self) -> bool:
        text = self._get("/metrics")
        held = re.findall(r"^narrows_requests_(?:running|waiting) (\S+)", text or "", re.M)
        return bool(held) and not any(map(float, held)) and self._get("/health") is not None

    def _get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(self.url + path, timeout=2) as answer:
                return str(answer.read().decode())
        except (OSError, urllib.error.URLError):
            return None

    def _cpu_s(self) -> float:
        def of(pid: int) -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

        return sum(self._of_each(of))

    def _of_each(self, figure: Callable[[int], float]) -> list[float]:
        found: list[float] = []
        for pid in family(self.pid).values():
            try:
                found.append(figure(pid))
            except OSError:  # it has ended meanwhile
                continue
        return found


def start(model: str, flags: list[str], log: str) -> Victim:
    """A new server, with the limit of descriptors that a login shell has; what it logs is appended to the file ``log``.

    Raises:
        SystemExit: it did not come up.
    """
    command = [sys.executable, "-m", "narrows", "serve", model, "--port", "0", *flags]

    def limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_USUAL_DESCRIPTORS, hard), hard))

    with open(log, "a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True, preexec_fn=limit
        )
    assert process.stdout is not None
    ready = re.search(r"ready at (http://\S+) ", process.stdout.readline())
    if ready is None:
        raise SystemExit("narrows serve did not start")
    return Victim(ready[1], process.pid, process)
