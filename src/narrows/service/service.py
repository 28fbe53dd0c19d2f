"""The backend of a server: any thread submits and aborts requests, and one thread keeps the ranks busy.

Callers meet the queue (`queue.py`), the thread runs the loop (`loop.py`), and `recovery.py` replaces failed ranks.
`narrows.api` defines what server and backend exchange.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from narrows.api import Generation, Health, Stats, Update
from narrows.engine.config import Resolved
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.ranks.timing import TIMING, Timing
from narrows.service.active_request import notify
from narrows.service.health import fault
from narrows.service.info import describe
from narrows.service.loop import Loop, Wake
from narrows.service.queue import RequestQueue
from narrows.service.recovery import Recovery, one_line
from narrows.service.stats import ServiceStats
from narrows.service.step_times import DriftRule
from narrows.service.trace import ServiceTrace

__all__ = ["EngineService"]

_LOG = logging.getLogger("narrows.engine")

_WARM_S = 0.15
"""For how long plans are made while ranks load; the others are made one by one when nothing runs."""
_LAST_TRACE_S = 5.0
"""Time for writing a trace that is under way when the service ends."""


class EngineService:
    """A backend over planned ranks.

    Args:
        max_queue: generations that may wait; more are refused, except those of a client that has fewer
            of them waiting than its even part.
        restart: start new ranks in place of failed ones, unless those have failed within a minute of being ready.
        drift: when to warn that steps are off their predicted time. trace: the writer of traces; by default
        nothing can.
        timing: the durations by which ranks are judged.
    """

    def __init__(
        self,
        resolved: Resolved,
        *,
        max_queue: int,
        restart: bool,
        drift: DriftRule | None = None,
        trace: ServiceTrace | None = None,
        timing: Timing = TIMING,
    ) -> None:
        self._resolved, self._timing = resolved, timing
        self._wake = Wake()
        self._queue = RequestQueue(max_queue, self._wake)
        self._stats = ServiceStats(drift or DriftRule())
        self._trace = trace or ServiceTrace("")
        self._recovery = Recovery(self._begin, self._queue, restart=restart)
        self._loop: Loop | None = None
        self._evidence = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="narrows serves", daemon=True)

    # --- life

    @property
    def failure(self) -> str:
        """Why it will never be ready again, in one line; empty as long as it may be."""
        return self._recovery.failure

    def start(self) -> None:
        """Start the ranks, load the model, and serve.

        Raises:
            ConfigError, CheckpointError: the model cannot be loaded.
            RankError: a rank did not start.
        """
        self._loop = loop = self._begin()
        self._queue.open(loop.engine)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing new and finish the rest; returns whether all finished within ``timeout_s``."""
        done = self._queue.drain(timeout_s)
        if self._trace.is_on and not self._queue.is_over:
            with suppress(ConfigError):  # it is in the log
                self._trace.stop(self._wake, _LAST_TRACE_S)
        return done

    def close(self) -> None:
        """End the ranks now; running requests get their last update. A second call does nothing."""
        self._queue.drain(0.0)
        self._closing.set()
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.engine.close()

    # --- for callers

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        """Take a generation in; returns its number. ``deliver`` is called on the loop's thread, and must not block.

        Raises:
            ConfigError: it can never run here (too long, an id outside the vocabulary).
            QueueFull: as many wait as may, and of this client not fewer than its even part.
            Draining, Unavailable: nothing is taken now.
        """
        return self._queue.submit(generation, deliver)

    def abort(self, number: int) -> None:
        """End a generation now; its pages are free within one step. One that has already ended is not changed."""
        self._queue.abort(number)

    def health(self) -> Health:
        """Looks at the ranks now: not ready while one is dead, silent, stuck or starting."""
        loop, detail = self._loop, self._queue.shut
        if not detail and not self._thread.is_alive():
            detail = "the engine's loop has ended"
        if not detail and loop is not None:
            detail = fault(loop.engine, loop.limits)
        return Health(ready=not detail, detail=detail, num_restarts=self._recovery.num_restarts)

    def stats(self) -> Stats:
        """Numbers of this moment, and totals since the start, over restarts."""
        return replace(self._stats.now(self._queue.num_arrived), restarts=self._recovery.num_restarts)

    def info(self) -> dict[str, Any]:
        """State, for JSON: config, mesh, ranks, limits, weight sharding, plan cache and sources of prices."""
        loop = self._loop
        engine = loop.engine if loop is not None else None
        return {
            **describe(self._resolved, engine, self._stats.steps_run(), self._stats.times_of_plans()),
            "price_evidence": self._evidence,
            "drift_factor": self._stats.drift.factor,
            "num_restarts": self._recovery.num_restarts,
            "max_queue": self._queue.limit,
        }

    @property
    def evidence(self) -> str:
        """One line if predictions rest on prices that were not measured, else empty."""
        return self._evidence

    def start_trace(self, num_steps: int | None = None) -> dict[str, Any]:
        """Begin a trace of the steps from now on, ``num_steps`` at most; returns its description.

        Raises:
            ConfigError: the service has no file for traces, one is under way, or an impossible number.
        """
        started = self._trace.start(num_steps)
        self._wake()
        return started

    def stop_trace(self) -> dict[str, Any]:
        """End the trace, or take the one that has ended by itself; returns a summary of the file.

        Raises:
            ConfigError: none was begun, or it cannot be written.
        """
        return self._trace.stop(self._wake)

    # --- the thread

    def _serve(self) -> None:
        """The thread's work: the loop, on new ranks after each failure that allows it."""
        try:
            while (loop := self._loop) is not None and not self._closing.is_set():
                try:
                    loop.run(self._closing)
                except Exception as error:
                    self._recover(loop, error)
        finally:
            for active in self._queue.end():
                notify(active, Update(finish_reason="abort", error="the server has ended"))

    def _begin(self) -> Loop:
        """Ranks that have loaded the model, and the loop on them."""
        engine = Engine(self._resolved, warm_s=_WARM_S, timing=self._timing)
        try:
            loop = Loop(engine, self._queue, self._stats, self._trace, self._wake)
            self._evidence = engine.plans.evidence()
        except BaseException:
            engine.close()
            raise
        return loop

    def _recover(self, loop: Loop, error: Exception) -> None:
        """End the running requests with the reason; then serve on new ranks, or not at all."""
        failed = f"the ranks have failed: {one_line(error)}"
        arrived = self._queue.close(failed)
        self._loop = None
        self._trace.lost(failed)
        self._stats.engine_lost()
        self._loop = started = self._recovery.after(loop, error, arrived)
        if started is not None:
            self._queue.open(started.engine)
            _LOG.warning("the ranks are ready again")
