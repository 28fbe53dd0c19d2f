"""Requests on their way to the loop: numbered, refused where too many wait, handed over, and forgotten.

Any thread may call; all state lies under one lock.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

from narrows.api import Draining, Generation, QueueFull, Unavailable, Update
from narrows.engine.core import Engine
from narrows.service.active_request import ActiveRequest

__all__ = ["RequestQueue"]

_RATE_OF = 64
"""Generations whose ends show how fast the queue moves."""


class RequestQueue:
    """Requests that wait for the loop, and those whose clients wait for an answer.

    Args:
        limit: generations that may wait; more are refused, except those of a client that has fewer of them
            waiting than its even part.
        wake: called when something has come.
    """

    def __init__(self, limit: int, wake: Callable[[], None]) -> None:
        self.limit, self._wake = limit, wake
        self._changed = threading.Condition()
        self._engine: Engine | None = None
        self._shut = "the ranks are starting"
        self._draining = self._over = False
        self._num_taken = 0
        self._active: dict[int, ActiveRequest] = {}
        self._arrived: list[ActiveRequest] = []
        self._unwanted: list[int] = []
        self._num_scheduled, self._scheduled = 0, dict[str, int]()
        self._ends: deque[float] = deque(maxlen=_RATE_OF)

    # --- for callers

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        """Take a generation in; returns its number (:meth:`narrows.api.Backend.submit`).

        Raises:
            ConfigError: it can never run here (too long, an id outside the vocabulary).
            QueueFull: as many wait as may, and of this client not fewer than its even part.
            Draining, Unavailable: nothing is taken now.
        """
        engine = self._taking(generation.client)
        request = engine.request(generation)  # outside the lock: it may be long
        with self._changed:
            if (taking := self._taking(generation.client)) is not engine:  # ranks were restarted meanwhile
                request = taking.request(generation)
            number, self._num_taken = self._num_taken, self._num_taken + 1
            active = ActiveRequest(number, generation, deliver, request)
            self._active[number] = active
            self._arrived.append(active)
        self._wake()
        return number

    def abort(self, number: int) -> None:
        """Have the loop end a generation; one that has already ended is not changed."""
        with self._changed:
            if number in self._active:
                self._unwanted.append(number)
        self._wake()

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing new; returns whether all requests finished within ``timeout_s``."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._active or self._over, timeout_s)

    @property
    def num_arrived(self) -> int:
        """Generations that the loop has not taken in yet."""
        return len(self._arrived)

    @property
    def shut(self) -> str:
        """Why nothing is taken now, be it not for a drain; empty while something is."""
        return self._shut

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._draining

    @property
    def is_over(self) -> bool:
        """Whether the loop has ended."""
        return self._over

    def _taking(self, client: str) -> Engine:
        """The engine that takes a new generation of this client."""
        with self._changed:
            engine = self._engine
            if self._draining:
                raise Draining("the server is ending: it finishes running requests and accepts no new ones")
            if self._shut or engine is None:
                raise Unavailable(f"no request is accepted now: {self._shut}")
            waiting = len(self._arrived) + self._num_scheduled
            if waiting >= self.limit and not self._has_fewer_than_its_part(client):
                raise QueueFull(
                    f"{waiting} generations wait already, and --max-queue is {self.limit}; try again later",
                    self._slot_free_in_s(),
                )
            return engine

    def _has_fewer_than_its_part(self, client: str) -> bool:
        """Whether fewer of its generations wait than it may have in any case: a queue that others have filled."""
        waiting = Counter(self._scheduled)
        waiting.update(active.generation.client for active in self._arrived)
        return waiting[client] < self.limit // len(waiting.keys() | {client})

    def _slot_free_in_s(self) -> float:
        """Seconds until a slot of the queue becomes free, by how often that has happened lately."""
        if len(self._ends) < 2:
            return 1.0
        return min(max((monotonic() - self._ends[0]) / len(self._ends), 1.0), 60.0)

    # --- for the loop

    def open(self, engine: Engine) -> None:
        """Take generations in for this engine from now on."""
        with self._changed:
            self._engine, self._shut = engine, ""

    def close(self, why: str) -> list[ActiveRequest]:
        """Take none until :meth:`open`; those that the loop had not taken in."""
        with self._changed:
            self._engine, self._shut = None, why
            arrived, self._arrived = self._arrived, []
            return arrived

    def take(self, limit: int) -> tuple[list[ActiveRequest], list[ActiveRequest]]:
        """Those that have come, and those that are not wanted any more, which are forgotten.

        At most ``limit`` of each, first come first; the others are left for later calls. An aborted request is
        returned only after it was returned as new.
        """
        with self._changed:
            arrived, self._arrived = self._arrived[:limit], self._arrived[limit:]
            to_come = {active.number for active in self._arrived}
            left: list[int] = []
            unwanted: list[ActiveRequest] = []
            for number in self._unwanted:
                if number in to_come or len(unwanted) == limit:
                    left.append(number)
                elif (active := self._active.pop(number, None)) is not None:
                    unwanted.append(active)
            self._unwanted = left
            self._changed.notify_all()
        return arrived, unwanted

    def put_back(self, requests: Iterable[ActiveRequest]) -> None:
        """Have the loop take these in before all others. One that is not wanted any more is found by its number."""
        with self._changed:
            self._arrived[:0] = requests

    def waits(self, count: int, by_client: Mapping[str, int]) -> None:
        """How many wait to run in the scheduler, in all and by client."""
        with self._changed:
            self._num_scheduled, self._scheduled = count, dict(by_client)

    def forget(self, *requests: ActiveRequest, ran: bool) -> None:
        """These have ended. ``ran``: on the ranks, so that slots become free as fast as that."""
        with self._changed:
            for active in requests:
                self._active.pop(active.number, None)
            if ran:
                self._ends.extend(monotonic() for _ in requests)
            self._changed.notify_all()

    def end(self) -> list[ActiveRequest]:
        """The loop has ended: nothing is taken any more; those that still wait for an answer."""
        with self._changed:
            left = list(self._active.values())
            self._active.clear()
            self._over = True
            self._shut = self._shut or "the server has ended"
            self._changed.notify_all()
        return left
