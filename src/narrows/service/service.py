"""An engine that serves: generations come and go from any thread while one thread of its own keeps the ranks busy.

Knows requests, steps, and what may befall the ranks; not HTTP or text. It is the backend of a server
(:mod:`narrows.api` has the words they share). The thread runs one loop: take in what has come, commit the
step that is done, hand out the next one, tell the callers; and waits when there is none of that. It never waits for
a rank, so aborts, drains and failures are seen while a step runs. When ranks fail, what they ran ends with an error,
and what only waited is run by the ranks that are started in their place.
"""

from __future__ import annotations

import gc
import logging
import math
import operator
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import fields, replace
from time import monotonic
from typing import Any

from narrows.api import Draining, Generation, Health, QueueFull, Stats, Unavailable, Update
from narrows.comm.device import is_done_when_called
from narrows.engine.collective_clock import CollectiveClock, Counted, added
from narrows.engine.config import Resolved
from narrows.engine.core import Engine, StepInFlight
from narrows.errors import ConfigError, RankError
from narrows.plan.book import bucket
from narrows.sched.scheduler import Request
from narrows.sched.stats import SchedulerStats
from narrows.service.info import describe
from narrows.service.step_times import DriftRule, StepTimes
from narrows.service.tickets import Ticket, tell
from narrows.service.trace import ServiceTrace
from narrows.service.trouble import stuck_s, trouble

__all__ = ["EngineService"]

_LOG = logging.getLogger("narrows.engine")

_TICK_S = 0.25
"""How often the loop looks at the ranks while nothing else wakes it."""
_READ_S = 2.0
"""How often the clocks of collectives are read while steps run."""
_RESTART_S = 60.0
"""Ranks that fail again so soon after they were started in place of others are not started a third time."""
_WARM_S = 0.15
"""For how long plans are made while ranks load; the others are made one by one when nothing runs."""
_LAST_TRACE_S = 5.0
"""What a trace that is being made when the service ends may take to be written."""
_RATE_OF = 64
"""Generations whose ends tell how fast places become free."""


class EngineService:
    """A backend over planned ranks.

    Args:
        max_queue: generations that may wait for a place; more are refused, except those of a client that has fewer
            of them waiting than its even part.
        restart: start new ranks in place of failed ones, unless those have failed within a minute of being started so.
        drift: when it is said that steps take another time than was predicted for them.
        trace: what writes traces; by default nothing can.
    """

    def __init__(
        self,
        resolved: Resolved,
        *,
        max_queue: int,
        restart: bool,
        drift: DriftRule | None = None,
        trace: ServiceTrace | None = None,
    ) -> None:
        self._resolved, self._max_queue, self._restart = resolved, max_queue, restart
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._serve, name="narrows serves", daemon=True)
        # What follows is shared with callers, under this lock.
        self._changed = threading.Condition()
        self._awake = False
        self._not_ready = "the ranks are starting"
        self._failure = ""
        self._draining = self._closing = self._over = False
        self._num_taken = self._num_restarts = 0
        self._arrived: list[Ticket] = []
        self._unwanted: list[int] = []
        self._tickets: dict[int, Ticket] = {}
        self._ends: deque[float] = deque(maxlen=_RATE_OF)
        self._scheduled: SchedulerStats | None = None
        self._waiting: dict[str, int] = {}  # in the scheduler, by client
        self._oldest: tuple[float, float] | None = None  # the oldest step in flight: since when, and seconds expected
        self._plans: Counter[tuple[str, int, str]] = Counter()
        self._collectives: dict[tuple[str, str], Counted] = {}
        self._times = StepTimes(drift or DriftRule())
        self._trace = trace or ServiceTrace("")
        # The rest is the loop's own.
        self._of_request: dict[int, Ticket] = {}
        self._evidence = ""
        self._before: SchedulerStats | None = None  # of engines that have failed
        self._reading: Future[list[Any]] | None = None
        self._has_clocks, self._num_unread = False, 0
        self._ends_of: deque[list[float]] = deque()  # of each step in flight, when it was handed out and when it ended
        self._read_at = self._restarted_at = -math.inf

    # --- life

    @property
    def failure(self) -> str:
        """Why it will never be ready again, in one line; empty as long as it may be."""
        return self._failure

    def start(self) -> None:
        """Start the ranks, load the model, and serve.

        Raises:
            ConfigError, CheckpointError: the model cannot be loaded.
            RankError: a rank did not start.
        """
        self._begin(Engine(self._resolved, warm_s=_WARM_S))
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, finish what is there; whether all was finished within ``timeout_s``."""
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not self._tickets or self._over, timeout_s)
        if self._trace.is_on and not self._over:
            with suppress(ConfigError):  # said in the log
                self._trace.stop(self._wake, _LAST_TRACE_S)
        return done

    def close(self) -> None:
        """End the ranks now; what still runs gets its last update. Again does nothing."""
        with self._changed:
            self._draining = self._closing = True
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    # --- what callers ask

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        """Take a generation in; returns its number. ``deliver`` is called on the loop's thread, and must not block.

        Raises:
            ConfigError: it can never run here (too long, an id outside the vocabulary).
            QueueFull: as many wait as may, and of this client not fewer than its even part.
            Draining, Unavailable: nothing is taken now.
        """
        engine = self._taking(generation.client)
        request = engine.request(generation)  # outside the lock: it may be long
        with self._changed:
            if (taking := self._taking(generation.client)) is not engine:  # ranks were started anew meanwhile
                request = taking.request(generation)
            number, self._num_taken = self._num_taken, self._num_taken + 1
            ticket = Ticket(number, generation, deliver, request)
            self._tickets[number] = ticket
            self._arrived.append(ticket)
        self._wake()
        return number

    def _taking(self, client: str) -> Engine:
        """The engine that takes a new generation of this client."""
        with self._changed:
            engine = self._engine
            if self._draining:
                raise Draining("the server is ending: it finishes what it has and takes nothing new")
            if self._not_ready or engine is None:
                raise Unavailable(f"no request can be taken now: {self._not_ready}")
            waiting = len(self._arrived) + (self._scheduled.waiting if self._scheduled else 0)
            if waiting >= self._max_queue and not self._has_fewer_than_its_part(client):
                raise QueueFull(
                    f"{waiting} generations wait already, and --max-queue is {self._max_queue}; try again later",
                    self._place_free_in_s(),
                )
            return engine

    def _has_fewer_than_its_part(self, client: str) -> bool:
        """Whether fewer of its generations wait than it may have in any case: a queue that others have filled."""
        waiting = Counter(self._waiting)
        waiting.update(ticket.generation.client for ticket in self._arrived)
        return waiting[client] < self._max_queue // len(waiting.keys() | {client})

    def _place_free_in_s(self) -> float:
        """Seconds until a place in the queue becomes free, by how often that has happened lately."""
        if len(self._ends) < 2:
            return 1.0
        return min(max((monotonic() - self._ends[0]) / len(self._ends), 1.0), 60.0)

    def abort(self, number: int) -> None:
        """End a generation now; its pages are free within one step. One that has ended already is left as it is."""
        with self._changed:
            if number in self._tickets:
                self._unwanted.append(number)
        self._wake()

    def health(self) -> Health:
        """Looks at the ranks now: not ready while one is dead, silent, stuck or starting."""
        with self._changed:
            detail, restarts, engine, oldest = self._not_ready, self._num_restarts, self._engine, self._oldest
            if not detail and not self._thread.is_alive():
                detail = "the engine's loop has ended"
        if not detail and engine is not None:
            detail = trouble(engine, oldest)
        return Health(ready=not detail, detail=detail, num_restarts=restarts)

    def stats(self) -> Stats:
        """Numbers of this moment, and totals since the start, over restarts."""
        with self._changed:
            now, arrived = self._scheduled, len(self._arrived)
            plans, collectives = dict(self._plans), dict(self._collectives)
            plan_seconds, predicted = dict(self._times.classes), dict(self._times.collectives)
        if now is None:
            return Stats()
        values = {field.name: getattr(now, field.name) for field in fields(now)}
        values["waiting"] += arrived
        return Stats(
            **values,
            plans=plans,
            plan_seconds=plan_seconds,
            collectives=dict(collectives),
            predicted_collectives=predicted,
        )

    def info(self) -> dict[str, Any]:
        """What runs: config, mesh, ranks, limits, forms, plan book and where its prices come from, for JSON."""
        with self._changed:
            engine, restarts = self._engine, self._num_restarts
            steps = dict(self._plans)
            times = self._times.documents()
        known = {"price_evidence": self._evidence, "drift_factor": self._times.rule.factor}
        return {
            **describe(self._resolved, engine, steps, times),
            **known,
            "num_restarts": restarts,
            "max_queue": self._max_queue,
        }

    @property
    def evidence(self) -> str:
        """One line if predictions rest on prices that were not measured, else empty."""
        return self._evidence

    def start_trace(self, num_steps: int | None = None) -> dict[str, Any]:
        """Begin to write a trace of the steps from now on, ``num_steps`` at most; what it will be.

        Raises:
            ConfigError: the service has no file for traces, one is being made, or a number that cannot be.
        """
        started = self._trace.start(num_steps)
        self._wake()
        return started

    def stop_trace(self) -> dict[str, Any]:
        """End the trace, or take the one that has ended by itself; what is in the file.

        Raises:
            ConfigError: none was begun, or it cannot be written.
        """
        return self._trace.stop(self._wake)

    def _wake(self, _: object = None) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    # --- the loop

    def _serve(self) -> None:
        """What the thread runs: the loop, on new ranks after each failure that allows it."""
        try:
            while not self._closing:
                try:
                    self._run()
                except Exception as error:
                    self._recover(error)
        finally:
            with self._changed:
                left = list(self._tickets.values())
                self._tickets.clear()
                self._over = True
                self._not_ready = self._not_ready or "the server has ended"
                self._changed.notify_all()
            for ticket in left:
                tell(ticket, Update(finish_reason="abort", error="the server has ended"))

    def _run(self) -> None:
        """The loop on one engine, until the service is closed; raises what ends the ranks."""
        engine = self._engine
        assert engine is not None
        while not self._closing:
            worked = self._take_in(engine)
            self._trace.mind(engine, self._wake)  # so that what came after it was asked for is in it
            touched: list[Request] = []
            if engine.in_flight and engine.in_flight[0].future.done():
                step = engine.in_flight[0]
                touched, worked = engine.take(), True
                self._time_oldest(engine)
                self._count(step)
            touched += engine.settle()
            if handed := engine.push():
                worked = True
                self._handed_out(engine, handed)
            self._read_clocks(engine)
            self._publish(engine)
            for request in touched:  # after the ranks have been given work
                self._tell_news(request)
            if not worked:
                self._wait(engine)

    def _take_in(self, engine: Engine) -> bool:
        """New generations, and those nobody wants any more; whether there were any."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            unwanted = [self._tickets.pop(number) for number in self._unwanted if number in self._tickets]
            self._unwanted = []
            self._changed.notify_all()
        for ticket in arrived:
            try:
                engine.scheduler.add(ticket.request)
            except Exception as error:
                self._give_up(ticket, error)
            else:
                self._of_request[ticket.request.id] = ticket
        for ticket in unwanted:
            engine.scheduler.abort(ticket.request)
            self._of_request.pop(ticket.request.id, None)
            tell(ticket, Update(finish_reason="abort"))
        return bool(arrived or unwanted)

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """End one generation that cannot be run after all; the others go on."""
        if not isinstance(error, ConfigError):
            _LOG.error("generation %d cannot be run", ticket.number, exc_info=error)
        with self._changed:
            self._tickets.pop(ticket.number, None)
            self._changed.notify_all()
        tell(ticket, Update(finish_reason="error", error=f"it cannot be run: {' '.join(str(error).split())}"))

    def _handed_out(self, engine: Engine, step: StepInFlight) -> None:
        """Count a step that the ranks have been given."""
        self._ends_of.append(StepTimes.watch(step.future))
        step.future.add_done_callback(self._wake)
        if len(engine.in_flight) == 1:
            self._time_oldest(engine)
        with self._changed:
            self._plans[step.batch.phase, bucket(step.batch.num_rows), step.plan.layout_name] += 1
        self._num_unread += 1

    def _count(self, step: StepInFlight) -> None:
        """Count the time of a step that has ended, and say so once if its bucket is off its prediction."""
        ends = self._ends_of.popleft()
        if self._resolved.plan is not None:  # one plan for every step predicts none of them
            return
        with self._changed:
            off = self._times.ended(step.batch, step.plan, ends)
        if off:
            _LOG.warning("%s", off)

    def _read_clocks(self, engine: Engine) -> None:
        """Ask the ranks now and then how long their collectives took, if any have run; take in what they said."""
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading.result(), None
            with self._changed:
                self._collectives = added(reading, self._collectives)
        now = monotonic()
        if self._has_clocks and self._num_unread and self._reading is None and now - self._read_at > _READ_S:
            self._read_at, self._num_unread = now, 0
            self._reading = engine.ranks.submit("readings")

    def _time_oldest(self, engine: Engine) -> None:
        oldest = engine.in_flight[0] if engine.in_flight else None
        with self._changed:
            self._oldest = (monotonic(), oldest.expected_s) if oldest else None

    def _publish(self, engine: Engine) -> None:
        """The scheduler's numbers for whoever asks from another thread."""
        now, waiting = engine.scheduler.stats(), engine.scheduler.shares.waiting
        with self._changed:
            self._scheduled, self._waiting = _summed(now, self._before), waiting

    def _tell_news(self, request: Request) -> None:
        ticket = self._of_request.get(request.id)
        if ticket is None:
            return
        update = ticket.news()
        if update.finish_reason:
            self._forget(ticket)
        tell(ticket, update)

    def _forget(self, ticket: Ticket) -> None:
        del self._of_request[ticket.request.id]
        with self._changed:
            self._tickets.pop(ticket.number, None)
            self._ends.append(monotonic())
            self._changed.notify_all()

    def _wait(self, engine: Engine) -> None:
        """Until something has come or is done; raises what has ended the ranks meanwhile, be they idle.

        Where nothing runs, what steps may ask for is made, a piece at a time, and whoever comes waits for one of them:
        first plans, a few milliseconds each, then rehearsals, each as long as a step.
        """
        busy = engine.in_flight or engine.scheduler.late
        while not (self._awake or busy) and (plan := engine.books.plan_ahead()) is not None:
            engine.prepare((plan,))
        if not (self._awake or busy) and (rehearsal := engine.rehearse_ahead()) is not None:
            rehearsal.add_done_callback(self._wake)
        with self._changed:
            if not self._awake:
                self._changed.wait(_TICK_S)
            self._awake = False
            oldest = self._oldest
        if (failure := engine.ranks.failure) is not None:
            raise failure
        if oldest is not None and monotonic() - oldest[0] > stuck_s(oldest[1]) + self._resolved.asked.timeout_s:
            age = monotonic() - oldest[0]
            raise RankError(f"a step has not ended in {age:.0f} s, and {oldest[1]:.2g} s were predicted")

    # --- failures

    def _begin(self, engine: Engine) -> None:
        """Serve with this engine from now on; it is closed with the service, whatever happens here."""
        with self._changed:
            self._engine = engine
        engine.when_mask_comes = self._wake
        self._has_clocks = is_done_when_called(self._resolved.asked.run_on) and self._resolved.mesh.size > 1
        if self._has_clocks:
            engine.instrument(CollectiveClock)
        engine.prepare(engine.books.plans())
        self._reading, self._num_unread = None, 0
        self._ends_of.clear()
        self._times.forget_ranks()
        with self._changed:
            self._not_ready, self._oldest = "", None
        self._evidence = engine.books.evidence()
        self._publish(engine)

    def _recover(self, error: Exception) -> None:
        """End what the ranks ran, with the reason; then start others, or fail for good."""
        reason = " ".join(str(error).split()) or type(error).__name__
        again = self._restart and not self._draining and monotonic() - self._restarted_at > _RESTART_S
        with self._changed:
            self._not_ready = f"the ranks have failed: {reason}"
            arrived, self._arrived = self._arrived, []
        self._trace.lost(f"the ranks have failed: {reason}")
        _LOG.error("the ranks have failed: %s", reason)
        if not isinstance(error, RankError):
            _LOG.error("where it was raised:", exc_info=error)
        begun = [ticket for ticket in self._of_request.values() if ticket.request.num_fed or not again]
        for ticket in begun:
            self._forget(ticket)
            if ticket.request.guide is not None:
                ticket.request.guide.end()
            tell(ticket, Update(finish_reason="error", error=f"the ranks failed while this text was made: {reason}"))
        waiting = [*self._of_request.values(), *arrived]
        self._of_request.clear()
        self._end_engine()
        try:
            if not again:
                raise RankError(reason)
            _LOG.warning("the ranks are started again; %d generations that waited will run there", len(waiting))
            self._restarted_at = monotonic()
            engine = Engine(self._resolved, warm_s=_WARM_S)
            self._begin(engine)
        except Exception as final:
            self._fail_for_good(" ".join(str(final).split()) or type(final).__name__, waiting)
            return
        for ticket in list(waiting):
            try:
                ticket.request = engine.request(ticket.generation)
            except Exception as error:
                waiting.remove(ticket)
                self._give_up(ticket, error)
        with self._changed:
            self._num_restarts += 1
            self._arrived[:0] = waiting  # one that nobody wants any more is found among them by its number
        _LOG.warning("the ranks are ready again")

    def _end_engine(self) -> None:
        """Close the engine that has failed, and keep its totals."""
        with self._changed:
            engine, self._engine, self._oldest = self._engine, None, None
            self._before = replace(self._scheduled, running=0, waiting=0) if self._scheduled else None
        if engine is not None:
            engine.close()
        del engine
        gc.unfreeze()  # the engine that a server began with
        gc.collect()  # what raised holds frames, and those the weights of ranks that are threads

    def _fail_for_good(self, reason: str, waiting: list[Ticket]) -> None:
        with self._changed:
            self._failure = f"the ranks have failed: {reason}"
            self._closing = True
            self._tickets = {number: each for number, each in self._tickets.items() if each not in waiting}
        for ticket in waiting:
            tell(ticket, Update(finish_reason="error", error=self._failure))


def _summed(now: SchedulerStats, before: SchedulerStats | None) -> SchedulerStats:
    """Totals over engines; what is of this moment stays as it is."""
    if before is None:
        return now
    totals = ("preemptions", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "steps")
    by_group = ("idle_rows", "group_preemptions", "short_steps")
    summed: dict[str, Any] = {name: getattr(now, name) + getattr(before, name) for name in totals}
    summed |= {name: tuple(map(operator.add, getattr(now, name), getattr(before, name))) for name in by_group}
    return replace(
        now,
        **summed,
        bound_steps={bound: steps + before.bound_steps.get(bound, 0) for bound, steps in now.bound_steps.items()},
    )
