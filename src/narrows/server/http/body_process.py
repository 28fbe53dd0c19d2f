"""The child process that reads large bodies: how the server starts, calls and replaces it, and its own code.

It has no torch, no event loop and no backend. Time and memory per body are bounded. A process whose memory has grown is
replaced, which returns the memory at once. Both ends are this program, so they exchange pickles.
"""

from __future__ import annotations

import json
import logging
import pickle
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import BaseModel

from narrows.server import child_process
from narrows.server.child_process import give_back
from narrows.server.cpu_priority import BODY_NICE, lower_process_priority
from narrows.server.http.errors import ApiError, invalid
from narrows.server.http.json_io import JsonLimits, read_body
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.request import RequestReader

__all__ = ["PROGRAM", "BodyProcess", "BodyProcessLimits", "run", "startup_message"]

_LOG = logging.getLogger("narrows.server")


class BodyProcess:
    """Reads bodies one after another, on one thread; :meth:`start` and :meth:`end` may be called from any."""

    def __init__(self, model: ServedModel, options: ServerOptions, limits: BodyProcessLimits | None = None) -> None:
        self._model, self._options = model, options
        self._limits = limits or BodyProcessLimits()
        self._told = b""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = self._is_late = False
        self.num_started = 0

    def start(self) -> None:
        """Start it, unless it runs; it gets ready by itself."""
        self._running()

    def ask(self, data: bytes, model: type[BaseModel], limits: JsonLimits, call: Callable[..., Any]) -> Any:
        """The result of ``call(reader, body)`` there.

        Raises:
            ApiError: the body's error; 400, it takes too much time or memory; 503, it could not be read.
        """
        process = self._running()
        watch = threading.Timer(self._limits.wall_s, self._late, (process,))
        watch.daemon = True
        watch.start()
        try:
            pickled_call = pickle.dumps((call, model, limits))
            sizes = b"".join(len(each).to_bytes(8, "little") for each in (pickled_call, data))
            child_process.write(process, sizes, pickled_call, data)
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
        child_process.close(process)

    def _late(self, process: subprocess.Popen[bytes]) -> None:
        self._is_late = True
        process.kill()

    def _replace(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        child_process.close(process)
        if not self._has_ended:
            self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._has_ended:
                raise ApiError(503, "the server is ending", code="draining")
            if self._process is not None and self._process.poll() is None:
                return self._process
            child_process.close(self._process)
            self._is_late = False
            process = self._process = child_process.start(PROGRAM, "narrows reads bodies")
            self.num_started += 1
            if not self._told:
                self._told = startup_message(self._model, self._options, self._limits)
        child_process.write(process, self._told)
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


PROGRAM = (
    "import json, sys; path = sys.stdin.buffer.readline() or sys.exit(1); sys.path[:] = json.loads(path); "
    "from narrows.server.http.body_process import run; run()"
)
"""The program of ``python -c``; its first message comes through stdin."""

_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyProcessLimits:
    """``cpu_s`` and ``wall_s``: for one body. ``memory_bytes``: beside the memory of the process at its start.

    ``grown_bytes``: a process that keeps more after a body is replaced.
    """

    cpu_s: float = 20.0
    wall_s: float = 120.0
    memory_bytes: int = 2048 * _MB
    grown_bytes: int = 48 * _MB


def startup_message(model: ServedModel, options: ServerOptions, limits: BodyProcessLimits) -> bytes:
    """The first message to the process."""
    import_path = json.dumps(sys.path).encode()
    data = pickle.dumps((model, options, limits))
    return import_path + b"\n" + len(data).to_bytes(8, "little") + data


def run() -> None:
    """Answer bodies until stdin ends."""
    lower_process_priority(BODY_NICE)
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    message = _next(source)
    if message is None:
        return
    model, options, limits = pickle.loads(message)
    reader = RequestReader(model, options)
    if model.tokenizer is not None:
        model.tokenizer.fewest_tokens("")
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, _pages(0) + limits.memory_bytes)
    before = _pages(1)
    while (head := source.read(16)) and len(head) == 16:
        sizes = [int.from_bytes(head[at : at + 8], "little") for at in (0, 8)]
        pickled_call, data = (source.read(size) for size in sizes)
        # Passing this ends the process, in any code: the signal has no handler.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        kind, value = _made(reader, pickled_call, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del pickled_call, data
        give_back()
        answer = pickle.dumps((kind, value, _pages(1) - before))
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def _made(reader: RequestReader, pickled_call: bytes, data: bytes) -> tuple[str, Any]:
    call, model, limits = pickle.loads(pickled_call)
    try:
        return "value", call(reader, read_body(data, model, limits))
    except ApiError as error:
        return "error", error
    except MemoryError:
        return "memory", None
    except Exception:
        return "failed", traceback.format_exc()


def _next(source: BinaryIO) -> bytes | None:
    size = source.read(8)
    return source.read(int.from_bytes(size, "little")) if len(size) == 8 else None


def _bound(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _pages(which: int) -> int:
    """Bytes of address space (0) or of memory (1) that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[which]) * resource.getpagesize()
