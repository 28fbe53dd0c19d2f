"""What a trial process does: it compiles grammars that may cost anything, under limits that end it if they are passed.

Knows llguidance and its own limits; no requests. Light on purpose: it imports no torch, and no more of narrows than the
limits. It reads a line of JSON (what it is to know), then grammars, each after its length; it answers each with a line
of JSON, and ends when no more can come. Ctrl-C and SIGTERM are its parent's affair.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

import llguidance

from narrows.server.free_memory import give_back
from narrows.server.grammar.limits import GrammarLimits

__all__ = ["PROGRAM", "run", "told_to"]

PROGRAM = (
    "import json, sys; told = json.loads(sys.stdin.buffer.readline() or sys.exit(1)); sys.path[:] = told['path']; "
    "from narrows.server.grammar.trial import run; run(told)"
)
"""What ``python -c`` runs. What it needs to know comes through its stdin."""

_STACK_BYTES = 1 << 20
"""Far less than a thread of the server has, so that what fits here fits there."""
_NICE = 10
"""Trials give way to the server and the ranks."""


def told_to(tokenizer: str, num_tokens: int, end_ids: list[int], limits: GrammarLimits) -> bytes:
    """What a trial process is told first: a line of JSON."""
    told = {
        "path": sys.path,
        "tokenizer": tokenizer,
        "num_tokens": num_tokens,
        "end_ids": end_ids,
        "limits": asdict(limits),
    }
    return json.dumps(told).encode() + b"\n"


def run(told: dict[str, Any]) -> None:
    """Answer grammars until stdin ends."""
    os.nice(_NICE)
    limits = GrammarLimits(**told["limits"])
    tokens = llguidance.LLTokenizer(told["tokenizer"], n_vocab=told["num_tokens"], eos_token=told["end_ids"] or None)
    del told["tokenizer"]
    _bound(resource.RLIMIT_STACK, _STACK_BYTES)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, _memory_mapped() + limits.memory_bytes)
    source, answers = sys.stdin.buffer, sys.stdout
    resident = _memory_pages(1)
    while (text := _next(source)) is not None:
        # Passing this ends the process, whatever code it is in: the signal has no handler.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        answer = _try(tokens, text, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        give_back()
        answer["grown"] = _memory_pages(1) - resident
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _try(tokens: llguidance.LLTokenizer, text: str, limits: GrammarLimits) -> dict[str, Any]:
    before = _memory_used()
    try:
        matcher = llguidance.LLMatcher(tokens, text, log_level=0, limits=limits.of_parser())
        if not matcher.is_error():
            matcher.compute_bitmask()
    except MemoryError:
        return {"memory": True}
    problem = matcher.get_error() if matcher.is_error() else ""
    return {"problem": problem, "bytes": max(0, _memory_used() - before)}


def _next(source: BinaryIO) -> str | None:
    head = source.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    body = source.read(size)
    return body.decode() if len(body) == size else None


def _bound(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _memory_mapped() -> int:
    """Bytes of address space that this process has."""
    return _memory_pages(0)


def _memory_pages(which: int) -> int:
    """Bytes of address space (0) or of memory (1) that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[which]) * resource.getpagesize()


class _MallInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _memory_used() -> int:
    """Bytes that are allocated, as glibc counts them; elsewhere, those that are mapped."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return _memory_mapped()
    ask.restype = _MallInfo
    found = ask()
    return int(found.uordblks) + int(found.hblkhd)
