"""Traces of an engine that serves: any thread requests their begin or end, and the service's loop does it.

A trace ends on request, or by itself after the requested number of steps. A thread of its own writes it, so that
nothing waits for a disk. The next trace overwrites it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from time import monotonic
from typing import Any

from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.instruments.trace_events import check_trace_file, write_trace
from narrows.instruments.trace_file import MOST_STEPS, trace_about, written_line
from narrows.instruments.tracer import DEFAULT_STEPS, Tracer

__all__ = ["ServiceTrace"]

_LOG = logging.getLogger("narrows.engine")
_END_S = 60.0
"""Seconds that the end of a trace waits for its file."""


class _State(StrEnum):
    NONE = "none"
    REQUESTED = "requested"
    RUNNING = "running"
    ENDING = "ending"


class ServiceTrace:
    """The one trace that a service may be making. ``file`` empty: it may make none.

    Raises:
        ConfigError: nothing can be written there, or a number of steps that cannot be.
    """

    def __init__(self, file: str, num_steps: int = DEFAULT_STEPS) -> None:
        _check_steps("--trace-steps", num_steps)
        if file:
            check_trace_file(file)
        self.file, self._num_steps = file, num_steps
        self._changed = threading.Condition()
        self._state = _State.NONE
        self._requested_steps = num_steps
        self._end_requested = False
        self._written: dict[str, Any] | None = None
        self._failure = ""
        # The rest is the loop's own.
        self._tracer: Tracer | None = None
        self._recorded: Future[list[Any]] | None = None

    # --- for callers

    def start(self, num_steps: int | None) -> dict[str, Any]:
        """Begin a trace of the next ``num_steps`` steps; at once, the file is written when it has ended.

        Raises:
            ConfigError: it was not started with a file for traces, one is under way, an impossible number.
        """
        steps = self._num_steps if num_steps is None else num_steps
        _check_steps("steps", steps)
        with self._changed:
            self._check_has_file()
            if self._state is not _State.NONE:
                raise ConfigError("a trace is already under way: POST /stop_profile ends it")
            self._state, self._requested_steps, self._end_requested = _State.REQUESTED, steps, False
            self._written, self._failure = None, ""
        return {"file": self.file, "steps": steps}

    def stop(self, wake: Callable[[], None], within_s: float = _END_S) -> dict[str, Any]:
        """End the trace and wait for its file, or for that of one that is complete; returns its summary.

        Raises:
            ConfigError: none is under way or was since the last call, or it could not be written.
        """
        with self._changed:
            self._check_has_file()
            if self._state is _State.NONE and self._written is None and not self._failure:
                raise ConfigError("no trace is under way: POST /start_profile begins one")
            self._end_requested = True
        wake()
        with self._changed:
            if not self._changed.wait_for(lambda: self._state is _State.NONE, within_s):
                raise ConfigError(f"the trace was not written within {within_s:g} s: the ranks are busy, or stuck")
            written, failure = self._written, self._failure
            self._written, self._failure = None, ""
        if written is None:
            raise ConfigError(f"the trace could not be written: {failure or 'another request has ended it'}")
        return written

    @property
    def is_on(self) -> bool:
        """Whether a trace is being made, or written."""
        return self._state is not _State.NONE

    def _check_has_file(self) -> None:
        if not self.file:
            raise ConfigError("this server writes no traces: start it with --trace FILE")

    # --- for the loop

    def mind(self, engine: Engine, wake: Callable[[object], None]) -> None:
        """Begin, end or write, if it is time for it; never waits."""
        if self._state is _State.NONE:
            return
        if self._state is _State.REQUESTED:
            self._tracer = Tracer(engine, self._requested_steps)
            self._state = _State.RUNNING
        tracer, recorded = self._tracer, self._recorded
        if self._state is _State.RUNNING and tracer is not None and (self._end_requested or tracer.done):
            recorded = self._recorded = tracer.end()
            recorded.add_done_callback(wake)
            self._state = _State.ENDING
        if recorded is not None and tracer is not None and recorded.done():
            self._tracer = self._recorded = None
            args = (tracer, recorded, engine.resolved.config.name, trace_about(engine))
            threading.Thread(target=self._write, args=args, name="narrows writes a trace", daemon=True).start()

    def lost(self, reason: str) -> None:
        """The ranks have failed: their records are lost."""
        if self._tracer is not None or self._state is _State.REQUESTED:
            self._tracer = self._recorded = None
            self._over(None, reason)

    def _write(self, tracer: Tracer, recorded: Future[list[Any]], name: str, about: dict[str, Any]) -> None:
        begun = monotonic()
        try:
            run = tracer.run(recorded.result(), name)
            num_events = write_trace(self.file, [run], about)
        except Exception as error:
            self._over(None, " ".join(str(error).split()) or type(error).__name__)
            return
        _LOG.warning("%s (written in %.1f s)", written_line(self.file, [run], num_events), monotonic() - begun)
        self._over({"file": self.file, "steps": len(run.steps), "events": num_events}, "")

    def _over(self, written: dict[str, Any] | None, failure: str) -> None:
        if failure:
            _LOG.error("no trace was written: %s", failure)
        with self._changed:
            self._state, self._written, self._failure = _State.NONE, written, failure
            self._changed.notify_all()


def _check_steps(what: str, num_steps: int) -> None:
    if not 1 <= num_steps <= MOST_STEPS:
        raise ConfigError(f"{what} is {num_steps}; it must be between 1 and {MOST_STEPS}")
