"""The loop of one engine: take new requests, commit the finished step, hand out the next one, send updates.

It never waits for a rank, so aborts, drains and failures are seen while a step runs. Without work it sleeps until it
is woken.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from narrows.api import Update
from narrows.engine.core import Engine, StepInFlight
from narrows.errors import ConfigError, RankError
from narrows.sched.scheduler import Request
from narrows.service.active_request import ActiveRequest, notify
from narrows.service.collectives import CollectiveReader
from narrows.service.queue import RequestQueue
from narrows.service.stats import ServiceStats
from narrows.service.step_limit import StepLimits
from narrows.service.step_times import StepTimes
from narrows.service.trace import ServiceTrace

__all__ = ["Loop", "Wake"]

_LOG = logging.getLogger("narrows.engine")

_TICK_S = 0.25
"""How often the loop looks at the ranks while nothing else wakes it."""
_TAKEN_AT_ONCE = 32
"""New and aborted requests of one round: a thousand that come or leave together hold up no step."""


class Wake:
    """Ends the loop's rest. Any thread may call it, a future that is done too."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self, _: object = None) -> None:
        self._event.set()

    @property
    def is_due(self) -> bool:
        """Whether it was called since the last rest."""
        return self._event.is_set()

    def rest(self, timeout_s: float) -> None:
        """Until it is called, or was since the last rest."""
        self._event.wait(timeout_s)
        self._event.clear()


class Loop:
    """An engine and the generations that it runs; all methods are called on one thread.

    ``limits``, for other threads to read: the oldest step in flight, and when it counts as stuck.
    """

    def __init__(
        self, engine: Engine, queue: RequestQueue, stats: ServiceStats, trace: ServiceTrace, wake: Wake
    ) -> None:
        self.engine = engine
        self.limits = StepLimits(engine.timing)
        self._queue, self._stats, self._trace, self._wake = queue, stats, trace, wake
        self._active: dict[int, ActiveRequest] = {}
        """Those that the scheduler has, by their request's id."""
        self._ends: deque[list[float]] = deque()  # of each step in flight, when it was handed out and when it ended
        engine.when_mask_comes = wake
        self._collectives = CollectiveReader(engine, stats.add_collectives)
        engine.prepare(engine.plans.values())
        self._publish()

    def run(self, closing: threading.Event) -> None:
        """Serve until ``closing``; raises the error that ends the ranks."""
        while not closing.is_set():
            if not self._work():
                self._rest()

    def _work(self) -> bool:
        """One round; whether there was anything to do. It leaves no reference to a request while the loop rests."""
        engine = self.engine
        worked = self._take_in()
        self._trace.mind(engine, self._wake)  # so that it includes everything after the request for it
        touched: list[Request] = []
        if engine.in_flight and engine.in_flight[0].future.done():
            step = engine.in_flight[0]
            touched, worked = engine.take(), True
            self.limits.ended()
            if engine.in_flight:
                self.limits.begun(engine.in_flight[0])
            self._ended(step)
        touched += engine.settle()
        if handed := engine.push():
            worked = True
            self._handed_out(handed)
        self._collectives.read()
        self._publish()
        for request in touched:  # after the ranks have been given work
            self._tell_news(request)
        return worked

    def end_failed(self, reason: str, *, all_of_them: bool) -> list[ActiveRequest]:
        """The ranks have failed: end the running generations, or all; returns the waiting ones."""
        for active in [each for each in self._active.values() if each.request.num_fed or all_of_them]:
            del self._active[active.request.id]
            self._queue.forget(active, ran=True)
            if active.request.guide is not None:
                active.request.guide.end()
            notify(active, Update(finish_reason="error", error=f"the ranks failed while this text was made: {reason}"))
        waiting = list(self._active.values())
        self._active.clear()
        return waiting

    def give_up(self, active: ActiveRequest, error: Exception) -> None:
        """End one generation that cannot run after all; the others continue."""
        if not isinstance(error, ConfigError):
            _LOG.error("generation %d cannot be run", active.number, exc_info=error)
        self._queue.forget(active, ran=False)
        notify(active, Update(finish_reason="error", error=f"it cannot be run: {' '.join(str(error).split())}"))

    def _take_in(self) -> bool:
        """Admit new requests and drop aborted ones; whether there were any."""
        arrived, unwanted = self._queue.take(_TAKEN_AT_ONCE)
        for active in arrived:
            try:
                self.engine.scheduler.add(active.request)
            except Exception as error:
                self.give_up(active, error)
            else:
                self._active[active.request.id] = active
        for active in unwanted:
            self.engine.scheduler.abort(active.request)
            self._active.pop(active.request.id, None)
            notify(active, Update(finish_reason="abort"))
        return bool(arrived or unwanted)

    def _handed_out(self, step: StepInFlight) -> None:
        """Count a step that the ranks have been given."""
        self._ends.append(StepTimes.watch(step.future))
        step.future.add_done_callback(self._wake)
        if len(self.engine.in_flight) == 1:
            self.limits.begun(step)
        self._stats.handed_out(step)
        self._collectives.handed_out()

    def _ended(self, step: StepInFlight) -> None:
        """Count the time of a step that has ended, and say so once if its bucket is off its prediction."""
        times = self._ends.popleft()
        if self.engine.resolved.plan is not None:  # one plan for every step predicts none of them
            return
        predicted = self.engine.plans.predicted_seconds(step.plan, step.batch)
        if off := self._stats.ended(step, predicted, times):
            _LOG.warning("%s", off)

    def _publish(self) -> None:
        """The scheduler's numbers, for other threads to read."""
        now = self.engine.scheduler.stats()
        self._stats.scheduled(now)
        self._queue.waits(now.waiting, self.engine.scheduler.shares.waiting)

    def _tell_news(self, request: Request) -> None:
        active = self._active.get(request.id)
        if active is None:
            return
        update = active.update()
        if update.finish_reason:
            del self._active[request.id]
            self._queue.forget(active, ran=True)
        notify(active, update)

    def _rest(self) -> None:
        """Wait until a request arrives or a step is done; raises the error of ranks that have ended meanwhile.

        An idle loop prepares later steps, a piece at a time: first plans, a few milliseconds each, then
        warm-up steps, each as long as a step. A request that arrives waits for one piece at most.
        """
        engine = self.engine
        busy = engine.in_flight or engine.scheduler.late
        while not (self._wake.is_due or busy) and (plan := engine.plans.plan_ahead()) is not None:
            engine.prepare((plan,))
        if not (self._wake.is_due or busy) and (warm_up := engine.warm_up_next()) is not None:
            warm_up.add_done_callback(self._wake)
        self._wake.rest(_TICK_S)
        if (failure := engine.ranks.failure) is not None:
            raise failure
        if stuck := self.limits.overdue(engine.resolved.engine_config.timeout_s):
            raise RankError(stuck)
