"""One trial process, from outside: started when it is needed, asked, ended at any moment. Knows pipes and signals."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable

from narrows.errors import ConfigError, NarrowsError
from narrows.server import child
from narrows.server.grammar.limits import GrammarLimits, in_words
from narrows.server.grammar.trial import PROGRAM

__all__ = ["Ended", "TrialProcess"]


_GROWN_BYTES = 32 << 20
"""A process that keeps more after a grammar is ended."""


class Ended(NarrowsError):  # noqa: N818 - what happened
    """The process was ended from here while it tried a grammar."""


class TrialProcess:
    """Tries grammars one after another, on one thread; :meth:`end` may be called from any.

    Args:
        told: the line of JSON that says what the process has to know; asked for at each start.
    """

    def __init__(self, told: Callable[[], bytes], limits: GrammarLimits) -> None:
        self._told, self._limits = told, limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._why_ended = ""
        self.num_started = 0

    def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
        """Compile the grammar there, and make its first mask; the bytes that it takes.

        ``wanted``: whether to begin at all. Whoever makes it false calls :meth:`end` after that.

        Raises:
            ConfigError: it is not valid, or passes a limit; the message says which.
            Ended: nobody wants it, or :meth:`end` was called meanwhile.
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
        """End the process now, if there is one; the next grammar starts another."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._why_ended = why or "ended"
                self._process.kill()

    def _start(self, wanted: Callable[[], bool]) -> subprocess.Popen[bytes]:
        with self._lock:
            if not wanted():
                raise Ended("nobody waits for the grammar any more")
            if self._process is not None and self._process.poll() is None and not self._why_ended:
                return self._process
            child.close(self._process)
            self._process = process = child.start(PROGRAM, "narrows grammar trial")
            self._why_ended = ""
            self.num_started += 1
        child.write(process, self._told())
        return process

    def _death(self, process: subprocess.Popen[bytes]) -> NarrowsError:
        """What it means that the process has ended amid a grammar."""
        code = process.wait()
        with self._lock:
            child.close(process)
            self._process, why = None, self._why_ended
            self._why_ended = ""
        if why == "ended":
            return Ended("nobody waits for the grammar any more")
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
    child.write(process, len(body).to_bytes(8, "little"), body)
    assert process.stdout is not None, "its output is a pipe"
    return process.stdout.readline()
