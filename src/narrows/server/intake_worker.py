"""What the process that reads large bodies does. It has no torch, no event loop and no backend.

It reads what it is to know, then bodies, each with the function that is to make something of it; it answers each, and
ends when no more can come. Both sides are the same program, so they speak in pickles. Ctrl-C and SIGTERM are its
parent's affair.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import Any, BinaryIO

from narrows.server.errors import ApiError
from narrows.server.free_memory import give_back
from narrows.server.intake import read_body
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.reading import Reading

__all__ = ["PROGRAM", "IntakeLimits", "run", "told_to"]

PROGRAM = (
    "import json, sys; path = sys.stdin.buffer.readline() or sys.exit(1); sys.path[:] = json.loads(path); "
    "from narrows.server.intake_worker import run; run()"
)
"""What ``python -c`` runs. What it needs to know comes through its stdin."""

_NICE = 5
"""Large bodies give way to the server and the ranks; but trials of constraints give way to them."""
_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeLimits:
    """``cpu_s`` and ``wall_s``: for one body. ``memory_bytes``: beside what the process has when it begins.

    ``grown_bytes``: a process that keeps more after a body is replaced.
    """

    cpu_s: float = 20.0
    wall_s: float = 120.0
    memory_bytes: int = 2048 * _MB
    grown_bytes: int = 48 * _MB


def told_to(model: ServedModel, options: ServerOptions, limits: IntakeLimits) -> bytes:
    """What the process is told first."""
    import_path = json.dumps(sys.path).encode()
    data = pickle.dumps((model, options, limits))
    return import_path + b"\n" + len(data).to_bytes(8, "little") + data


def run() -> None:
    """Answer bodies until stdin ends."""
    os.nice(_NICE)
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    told = _next(source)
    if told is None:
        return
    model, options, limits = pickle.loads(told)
    reading = Reading(model, options)
    if model.tokenizer is not None:
        model.tokenizer.fewest_tokens("")
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, _pages(0) + limits.memory_bytes)
    before = _pages(1)
    while (head := source.read(16)) and len(head) == 16:
        sizes = [int.from_bytes(head[at : at + 8], "little") for at in (0, 8)]
        asked, data = (source.read(size) for size in sizes)
        # Passing this ends the process, whatever code it is in: the signal has no handler.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        kind, value = _made(reading, asked, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del asked, data
        give_back()
        answer = pickle.dumps((kind, value, _pages(1) - before))
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def _made(reading: Reading, asked: bytes, data: bytes) -> tuple[str, Any]:
    call, model, limits = pickle.loads(asked)
    try:
        return "value", call(reading, read_body(data, model, limits))
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
