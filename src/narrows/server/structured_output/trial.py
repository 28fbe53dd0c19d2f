"""Limits on grammars, and the child process that finds out whether a grammar keeps to them.

The process has no torch and imports no more of narrows than it needs. It reads a line of JSON (the tokenizer and the
limits), then grammars, each after its length. It answers each with a line of JSON and ends with its stdin.
"""

from __future__ import annotations

import ctypes
import json
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import llguidance

from narrows.errors import ConfigError, NarrowsError
from narrows.server import child_process
from narrows.server.child_process import give_back
from narrows.server.cpu_priority import GRAMMAR_NICE, lower_process_priority

__all__ = ["PROGRAM", "Ended", "GrammarLimits", "TrialProcess", "in_words", "run", "startup_message"]

_MB = 1 << 20
_SIZES = (
    "too many expressions",
    "too many states",
    "too many items",
    "too big",
    "current row has",
    "lexer precomputation failed",
)
"""How llguidance begins to say that one of its limits was met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Limits of one grammar, and of all.

    ``cpu_s`` and ``memory_bytes``: processor time and memory that compiling it and making its first mask may take.
    ``wall_s``: after how many seconds that is given up in any case. ``chars``: of its text. ``lexer_fuel``: steps of
    building its automaton; ``step_fuel`` and ``step_items``: steps of lexer and parser in one mask; ``lexer_states``:
    states that the automaton may grow to. ``mask_s``: processor time of one mask.

    ``num_kept`` and ``kept_bytes``: compiled grammars that are kept for later requests, and their memory.
    ``total_bytes``: memory of all grammars that are kept or in use. ``num_waiting``: distinct grammars that may wait to
    be compiled. ``failed_s``: for how long it is remembered that a grammar failed; ``num_failed``: of how many.
    """

    cpu_s: float = 1.0
    wall_s: float = 30.0
    memory_bytes: int = 128 * _MB
    chars: int = 1_000_000
    lexer_fuel: int = 400_000
    step_fuel: int = 200_000
    step_items: int = 50_000
    lexer_states: int = 20_000
    mask_s: float = 0.25
    num_kept: int = 64
    kept_bytes: int = 64 * _MB
    total_bytes: int = 512 * _MB
    num_waiting: int = 64
    failed_s: float = 60.0
    num_failed: int = 256

    def of_parser(self) -> llguidance.LLParserLimits:
        """The part of them that llguidance keeps."""
        return llguidance.LLParserLimits(
            initial_lexer_fuel=self.lexer_fuel,
            step_lexer_fuel=self.step_fuel,
            step_max_items=self.step_items,
            max_lexer_states=self.lexer_states,
            verbose_errors=False,
        )

    @property
    def too_slow(self) -> str:
        """The message for a grammar that takes more time."""
        return (
            f"the constraint takes more than {self.cpu_s:g} s of processor time to compile, the limit; make it "
            "simpler: large multipleOf, many patternProperties and nested repetitions cost most"
        )

    @property
    def too_much_memory(self) -> str:
        """The message for a grammar that takes more memory."""
        return (
            f"the constraint takes more than {self.memory_bytes // _MB} MB of memory to compile, the limit; make it "
            "smaller: large enums, choices and repetitions cost most"
        )

    def slow_mask(self, seconds: float) -> str:
        """The message for a grammar that takes so long for one mask."""
        return f"one token's mask took {seconds:.2g} s of processor time; the limit is {self.mask_s:g} s"


def in_words(problem: str, limits: GrammarLimits) -> str:
    """llguidance's error in one line: with the reason, which it gives some lines below, and the limit.

    In between it quotes the grammar, which is not the client's text.
    """
    lines = [line.strip() for line in problem.replace("<non-verbose/>", "").splitlines() if line.strip()]
    if not lines:
        return "not valid"
    reasons = [line.removeprefix("error:").strip() for line in lines[1:] if line.startswith("error:")]
    if lines[0].startswith("NoExtension"):
        return "the constraint allows no first token, so no text fulfils it; change it"
    first = re.sub(r"^at \d+\(\d+\): ", "", lines[0])
    message = " ".join([first[:500].rstrip(), *(reason[:500] for reason in reasons[:1])])
    if any(size in message.lower() for size in _SIZES):
        message += (
            f"; the limits are {limits.lexer_fuel} steps to build the automaton, {limits.lexer_states} states, and "
            f"{limits.step_fuel} steps and {limits.step_items} items for one token's mask: make the constraint simpler"
        )
    return message


_GROWN_BYTES = 32 << 20
"""A process that keeps more after a grammar is ended."""


class Ended(NarrowsError):  # noqa: N818 - an event
    """The process was ended from here while it tried a grammar."""


class TrialProcess:
    """Tries grammars one after another, on one thread; :meth:`end` may be called from any.

    Args:
        message: gives the line of JSON that the process reads first; called at each start.
    """

    def __init__(self, message: Callable[[], bytes], limits: GrammarLimits) -> None:
        self._message, self._limits = message, limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._why_ended = ""
        self.num_started = 0

    def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
        """Compile the grammar there, and make its first mask; the bytes that it takes.

        ``wanted``: whether to begin at all. After it turns false, :meth:`end` is called.

        Raises:
            ConfigError: it is not valid, or passes a limit; the message says which.
            Ended: it is not wanted any more, or :meth:`end` was called meanwhile.
        """
        process = self._start(wanted)
        watch = threading.Timer(self._limits.wall_s, self.end, (f"{self._limits.wall_s:g} s",))
        watch.daemon = True
        watch.start()
        try:
            line = _ask(process, text.encode())
        finally:
            watch.cancel()
        if not line:
            raise self._death(process)
        answer = json.loads(line)
        if answer.get("memory") or answer["grown"] > _GROWN_BYTES:
            self.end()  # and its memory is back; another is started when it is needed
        if answer.get("memory"):
            raise ConfigError(self._limits.too_much_memory)
        if answer["problem"]:
            raise ConfigError(in_words(answer["problem"], self._limits))
        return int(answer["bytes"])

    def end(self, why: str = "") -> None:
        """End the process now, if one runs; the next grammar starts another."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._why_ended = why or "ended"
                self._process.kill()

    def _start(self, wanted: Callable[[], bool]) -> subprocess.Popen[bytes]:
        with self._lock:
            if not wanted():
                raise Ended("no request waits for the grammar any more")
            if self._process is not None and self._process.poll() is None and not self._why_ended:
                return self._process
            child_process.close(self._process)
            self._process = process = child_process.start(PROGRAM, "narrows grammar trial")
            self._why_ended = ""
            self.num_started += 1
        child_process.write(process, self._message())
        return process

    def _death(self, process: subprocess.Popen[bytes]) -> NarrowsError:
        """The error of a process that has ended during a grammar."""
        code = process.wait()
        with self._lock:
            child_process.close(process)
            self._process, why = None, self._why_ended
            self._why_ended = ""
        if why == "ended":
            return Ended("no request waits for the grammar any more")
        if why:
            return ConfigError(f"the constraint was not compiled within {why}: this machine is very busy; try again")
        if code == -signal.SIGPROF:
            return ConfigError(self._limits.too_slow)
        if code in (-signal.SIGABRT, -signal.SIGKILL):
            return ConfigError(self._limits.too_much_memory)
        if code in (-signal.SIGSEGV, -signal.SIGBUS):
            return ConfigError("the constraint is nested too deeply to compile; make it flatter")
        return NarrowsError(f"the constraint could not be tried: the process that does so ended with code {code}")


def _ask(process: subprocess.Popen[bytes], body: bytes) -> bytes:
    """The line that is answered; empty if the process has ended."""
    child_process.write(process, len(body).to_bytes(8, "little"), body)
    assert process.stdout is not None, "its output is a pipe"
    return process.stdout.readline()


PROGRAM = (
    "import json, sys; first = json.loads(sys.stdin.buffer.readline() or sys.exit(1)); sys.path[:] = first['path']; "
    "from narrows.server.structured_output.trial import run; run(first)"
)
"""The program of ``python -c``; its first message comes through stdin."""

_STACK_BYTES = 1 << 20
"""Far less than a thread of the server has, so that a grammar that fits here fits there."""


def startup_message(tokenizer: str, num_tokens: int, end_ids: list[int], limits: GrammarLimits) -> bytes:
    """The first message to a trial process: a line of JSON."""
    message = {
        "path": sys.path,
        "tokenizer": tokenizer,
        "num_tokens": num_tokens,
        "end_ids": end_ids,
        "limits": asdict(limits),
    }
    return json.dumps(message).encode() + b"\n"


def run(message: dict[str, Any]) -> None:
    """Answer grammars until stdin ends."""
    lower_process_priority(GRAMMAR_NICE)
    limits = GrammarLimits(**message["limits"])
    tokens = llguidance.LLTokenizer(
        message["tokenizer"], n_vocab=message["num_tokens"], eos_token=message["end_ids"] or None
    )
    del message["tokenizer"]
    _bound(resource.RLIMIT_STACK, _STACK_BYTES)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, _memory_mapped() + limits.memory_bytes)
    source, answers = sys.stdin.buffer, sys.stdout
    resident = _memory_pages(1)
    while (text := _next(source)) is not None:
        # Passing this ends the process, in any code: the signal has no handler.
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
