"""A real server: `narrows serve` as a user starts it, in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from patience import PATIENCE_S
from processes_lab import rank_pids

__all__ = ["ServerProcess", "events"]


class ServerProcess:
    """Started, and ready once the ready line is out; a context manager that leaves nothing."""

    def __init__(self, *options: str, model: str = "narrows-demo", stderr: Any = None, log: Path | None = None) -> None:
        command = [sys.executable, "-m", "narrows", "serve", model, "--port", "0", *options]
        self._log = log
        with (log or Path(os.devnull)).open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr or errors, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        found = re.search(r"ready at (http://\S+) ", self.ready_line)
        if not found:
            self.__exit__()
        assert found, f"it did not become ready: {self.ready_line!r} {self.said}"
        self.url = found[1]

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self._log.read_text() if self._log else ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def rank_pids(self) -> list[int]:
        """The processes of its ranks, in rank order."""
        return rank_pids(self.process.pid)

    def complete(self, prompt: Any = "The sea", **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)

    def text(self, prompt: Any = "The sea", **fields: Any) -> str:
        answer = self.complete(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        for line in httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines():
            if line.startswith(f"narrows_{name} "):
                return float(line.split()[1])
        raise AssertionError(f"there is no metric {name}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def events(lines: Iterable[str]) -> list[Any]:
    """Server-sent events, parsed; the last one is the string that ends a stream."""
    datas = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]
