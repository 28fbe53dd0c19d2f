"""The process that reads large bodies, from outside: bytes go in, small results come out, and it may end at any moment.

What it takes of time and memory is bounded. When it has grown, it is replaced: memory is back at once then.
"""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from narrows.server import child
from narrows.server.errors import ApiError, invalid
from narrows.server.intake_worker import PROGRAM, IntakeLimits, told_to
from narrows.server.json_body import JsonLimits
from narrows.server.options import ServedModel, ServerOptions

__all__ = ["IntakeProcess"]

_LOG = logging.getLogger("narrows.server")


class IntakeProcess:
    """Reads bodies one after another, on one thread; :meth:`start` and :meth:`end` may be called from any."""

    def __init__(self, model: ServedModel, options: ServerOptions, limits: IntakeLimits | None = None) -> None:
        self._model, self._options = model, options
        self._limits = limits or IntakeLimits()
        self._told = b""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = self._is_late = False
        self.num_started = 0

    def start(self) -> None:
        """Start it, unless it runs; it gets ready by itself."""
        self._running()

    def ask(self, data: bytes, model: type[BaseModel], limits: JsonLimits, call: Callable[..., Any]) -> Any:
        """What ``call`` makes of a body there: ``call(reading, body)``.

        Raises:
            ApiError: what is wrong with the body; 400, it takes too much time or memory; 503, it could not be read.
        """
        process = self._running()
        watch = threading.Timer(self._limits.wall_s, self._late, (process,))
        watch.daemon = True
        watch.start()
        try:
            asked = pickle.dumps((call, model, limits))
            child.write(process, b"".join(len(each).to_bytes(8, "little") for each in (asked, data)), asked, data)
            answer = _answer(process)
        finally:
            watch.cancel()
        if answer is None:
            raise self._death(process)
        kind, value, grown_bytes = answer
        if grown_bytes > self._limits.grown_bytes:
            self._replace()
        if kind == "value":
            return value
        if kind == "memory":
            raise invalid("the body takes too much memory to read; send less in one request")
        if kind == "failed":
            _LOG.error("a body could not be read:\n%s", value)
            raise ApiError(500, "the server failed on this request: its body could not be read")
        assert isinstance(value, ApiError)
        raise value

    def end(self) -> None:
        """End it for good."""
        with self._lock:
            self._has_ended = True
            process, self._process = self._process, None
        child.close(process)

    def _late(self, process: subprocess.Popen[bytes]) -> None:
        self._is_late = True
        process.kill()

    def _replace(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        child.close(process)
        if not self._has_ended:
            self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._has_ended:
                raise ApiError(503, "the server is ending", code="draining")
            if self._process is not None and self._process.poll() is None:
                return self._process
            child.close(self._process)
            self._is_late = False
            process = self._process = child.start(PROGRAM, "narrows reads bodies")
            self.num_started += 1
            if not self._told:
                self._told = told_to(self._model, self._options, self._limits)
        child.write(process, self._told)
        return process

    def _death(self, process: subprocess.Popen[bytes]) -> ApiError:
        code = process.wait()
        self._replace()
        seconds = self._limits.wall_s if self._is_late else self._limits.cpu_s
        if self._is_late or code == -signal.SIGPROF:
            return invalid(f"the body takes more than {seconds:g} s to read; send less in one request")
        _LOG.error("the process that reads bodies ended with code %d", code)
        return ApiError(503, "the body could not be read; try again, or send less in one request", code="unavailable")


def _answer(process: subprocess.Popen[bytes]) -> tuple[str, Any, int] | None:
    """Its answer; None if it has ended."""
    assert process.stdout is not None, "its output is a pipe"
    head = process.stdout.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    data = process.stdout.read(size)
    if len(data) < size:
        return None
    found: tuple[str, Any, int] = pickle.loads(data)
    return found
