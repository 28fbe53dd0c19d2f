"""Seconds and bytes of an engine's collectives, read from its ranks now and then while steps run."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any

from narrows.comm.device import is_synchronous
from narrows.engine.calls import RankWorker
from narrows.engine.core import Engine
from narrows.instruments.collective_clock import CollectiveClock

__all__ = ["CollectiveReader"]

_READ_S = 2.0
"""How often the clocks are read while steps run."""


class CollectiveReader:
    """Reads the clocks of one engine's ranks, where they have collectives and a clock is worth something there.

    ``add`` takes one reading of every rank. Called by the engine's loop; never waits for a rank.
    """

    def __init__(self, engine: Engine, add: Callable[[list[Any]], None]) -> None:
        self._engine, self._add = engine, add
        resolved = engine.resolved
        self._has_clocks = is_synchronous(resolved.engine_config.run_on) and resolved.mesh.size > 1
        if self._has_clocks:
            engine.instrument(CollectiveClock)
        self._num_unread, self._read_at = 0, -math.inf
        self._reading: Future[list[Any]] | None = None

    def handed_out(self) -> None:
        """The ranks have been given a step."""
        self._num_unread += 1

    def read(self) -> None:
        """Add the ranks' last readings, and request new ones if steps have run since."""
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading.result(), None
            self._add(reading)
        now = monotonic()
        if self._has_clocks and self._num_unread and self._reading is None and now - self._read_at > _READ_S:
            self._read_at, self._num_unread = now, 0
            self._reading = self._engine.ranks.submit(RankWorker.readings)
