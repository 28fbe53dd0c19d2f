"""The engine: one scheduler, one plan cache, and the ranks that obey them. Token ids in, token ids out.

One step is always scheduled ahead: while the ranks compute step n, the host schedules step n + 1, whose tokens may
refer to samples that it has not seen.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

from narrows.api import Generation
from narrows.arch.positions import cache_salt
from narrows.arch.stages import Field
from narrows.comm.communicator import Communicator
from narrows.engine.calls import RankWorker
from narrows.engine.config import Resolved
from narrows.engine.plans import EnginePlans
from narrows.engine.program import Wrap
from narrows.engine.ranks import start_ranks
from narrows.engine.step_record import Reader
from narrows.engine.warmup import WarmUp, warmup_batch
from narrows.engine.worker import StepResult, Worker
from narrows.errors import ConfigError
from narrows.models.decoder import RankContext
from narrows.ops.int8 import Quantization
from narrows.plan.plan import Plan
from narrows.ranks.calls import Ranks
from narrows.ranks.start_clock import StartClock
from narrows.ranks.timing import TIMING, Timing
from narrows.sched.batch import Batch
from narrows.sched.guide import Guide
from narrows.sched.sampling import SamplingParams
from narrows.sched.scheduler import Request, Scheduler
from narrows.sched.stats import SchedulerStats
from narrows.weights.source import WeightSource

__all__ = ["Engine", "StepInFlight", "StepTracer"]

_SEEDS = random.Random()
"""Of requests without one. Seeded once by the system: asking it each time gives up the interpreter's lock."""
_AHEAD = 2
"""Steps that the ranks have been given at most: the one they run, and the next."""
_MASK_S = 0.002
_MASK_EACH_S = 0.0002
_MASK_MOST_S = 0.02
"""How long a step is held for the masks of its guided rows: so long, and so long more for each, up to a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInFlight:
    """A step that the ranks have been given, and the plan they run it by."""

    batch: Batch
    plan: Plan
    future: Future[list[StepResult]]

    @property
    def expected_s(self) -> float:
        """Seconds that it may take by its plan's price. Plans are priced at one context; attention grows with the
        longest that the batch really has, and nothing grows faster."""
        longest = max(chunk.start + len(chunk.tokens) for group in self.batch.groups for chunk in group)
        return self.plan.seconds * max(1.0, longest / self.plan.shape.context)


class StepTracer(Protocol):
    """Callbacks of an engine's steps while they are traced (`instruments/tracer.py`)."""

    @property
    def full(self) -> bool:
        """Whether no further step is recorded."""
        ...

    def submit(self, batch: Batch, plan: Plan, keep_logits: bool, stats: SchedulerStats) -> Future[list[StepResult]]:
        """Hand a step to the ranks, and note it."""
        ...

    def on_host(self, name: str, start: float, end: float) -> None:
        """Note work of the host; times of ``perf_counter``."""
        ...

    def passed(self) -> None:
        """Note that a step ran unrecorded."""
        ...


class Engine:
    """Ranks loaded and ready. A context manager: closing ends them.

    Args:
        wrap: put around every bound op of every rank, for verification; for rank threads only.
        source: weights, if not those that ``resolved`` names; sent to rank processes.
        validate: check every plan before it runs; only a test that plants a fault switches that off.
        warm_s: seconds to make plans in while the ranks load, for the buckets that steps will ask for first;
            :meth:`prepare` has the ranks bind them.
        timing: the durations by which ranks are judged.
        clock: gets the phases of the start.

    Raises:
        CheckpointError, ConfigError: the weights cannot be loaded; ``wrap`` for ranks that are processes.
        RankError: a rank did not start.
    """

    def __init__(
        self,
        resolved: Resolved,
        *,
        wrap: Callable[[Worker], Wrap] | None = None,
        source: WeightSource | None = None,
        validate: bool = True,
        warm_s: float = 0.0,
        timing: Timing = TIMING,
        clock: StartClock | None = None,
    ) -> None:
        self.resolved, self.timing = resolved, timing
        self.plans = EnginePlans(resolved)
        self.scheduler = Scheduler(resolved.limits)
        self._ids = itertools.count()
        self.in_flight: deque[StepInFlight] = deque()
        self._mask_came = threading.Event()
        self.when_mask_comes: Callable[[], None] = self._mask_came.set
        """Called, from any thread, when a late mask is ready, so that :meth:`settle` should be called."""
        self._tracer: StepTracer | None = None
        self._warming_up: Future[list[Any]] | None = None
        self._observe: Callable[[Batch, Plan], None] | None = None
        drawn = resolved.plan is None or resolved.plan.gives_logits
        self._warmup = WarmUp(resolved.limits, resolved.engine_config.warmup_rows, drawn=drawn)
        if wrap is not None and resolved.engine_config.ranks != "threads":
            raise ConfigError("what is put around the steps of ranks shares memory with them: use --ranks threads")
        if source is None and resolved.engine_config.ranks == "threads":
            source = resolved.weights()  # one for all threads; a process opens its own
        make = partial(
            _make_worker,
            resolved=resolved,
            source=source,
            fields=self.plans.planner.chain.fields,
            wrap=wrap,
            validate=validate,
        )
        plan_ahead = partial(self.plans.plan_ahead_for, warm_s)
        planning = threading.Thread(target=plan_ahead, name="narrows plans ahead", daemon=True)
        try:  # this process has nothing else to do until the ranks are ready
            self.ranks: Ranks[RankWorker] = start_ranks(resolved, make, timing, meanwhile=planning.start, clock=clock)
        finally:
            if planning.ident is not None:
                planning.join()

    def warm_up_next(self) -> Future[list[Any]] | None:
        """Have the ranks run the next warm-up step, without waiting. For when no step is in flight.

        None: the previous one is not done, none is left, or these ranks cannot capture.
        """
        if self._warming_up is not None:
            if not self._warming_up.done():
                return None
            if not self._warming_up.result()[0]:
                self._warmup.end()
        batch = self._warmup.next()
        self._warming_up = (
            None if batch is None else self.ranks.submit_first(RankWorker.warm_up, batch, self.plans.plan_for(batch))
        )
        return self._warming_up

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Have the ranks bind plans, without waiting, so that the first step of a bucket finds its plan there."""
        if plans:
            self.ranks.submit(RankWorker.prepare, plans)

    def add(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        guide: Guide | None = None,
        client: str = "",
    ) -> Request:
        """Queue a prompt; the arguments are a :class:`~narrows.api.Generation`'s.

        Raises:
            ConfigError: as :meth:`request`.
        """
        request = self.request(
            Generation(
                prompt=prompt,
                max_tokens=max_tokens,
                end_ids=eos_ids,
                sampling=sampling,
                priority=priority,
                guide=guide,
                client=client,
            )
        )
        self.scheduler.add(request)
        return request

    def request(self, generation: Generation) -> Request:
        """A request that can run here and waits for nothing yet. Any thread may ask for one.

        Without its own seed, a request that draws gets one.

        Raises:
            ConfigError: it can never run here (empty, or longer than the context or the cache, or not under the plan).
        """
        self._check_ids(generation.prompt)
        self._check_sampling(generation.sampling, generation.guide)
        sampling = generation.sampling
        if sampling is not None and sampling.temperature > 0 and sampling.seed is None:
            sampling = sampling.with_seed(_SEEDS.getrandbits(63))
        request = Request(
            id=next(self._ids),
            prompt=generation.prompt,
            max_tokens=generation.max_tokens,
            eos_ids=generation.end_ids,
            sampling=sampling,
            priority=generation.priority,
            guide=generation.guide,
            client=generation.client,
            cache_salt=cache_salt(self.resolved.config, len(generation.prompt)),
        )
        self.scheduler.check(request)
        return request

    def _check_ids(self, prompt: tuple[int, ...]) -> None:
        vocab_size = self.resolved.config.vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ConfigError(f"token id {wrong} of the prompt is outside the model's vocabulary of {vocab_size}")

    def _check_sampling(self, sampling: SamplingParams | None, guide: Guide | None) -> None:
        vocab_size = self.resolved.config.vocab_size
        if sampling is not None and sampling.logit_bias and (token := max(sampling.logit_bias)[0]) >= vocab_size:
            raise ConfigError(f"logit_bias names token {token}, outside the model's vocabulary of {vocab_size}")
        saved = self.resolved.plan
        if saved is None or (guide is None and (sampling is None or not sampling.needs_logits)):
            return
        if not saved.gives_logits:
            raise ConfigError(
                "the saved plan ends in each shard's best token, so it cannot sample, penalise or give "
                "log-probabilities; run greedily, or leave --plan out"
            )

    def run(self) -> Iterator[Request]:
        """Run steps until no request has work; yields a request each time it has got a token, or has ended.

        A caller that stops early may continue with another call. Once a rank has failed every call raises its error.
        """
        while self.scheduler.has_work or self.in_flight:
            # Steps in flight are kept even if their caller stops listening: later steps may refer to their samples.
            yield from self.settle()
            if self.push() is not None and len(self.in_flight) < _AHEAD:
                continue
            if self.in_flight:
                yield from self.take()
            elif self.scheduler.late:  # nothing else can run
                self._mask_came.wait()
                self._mask_came.clear()

    def push(self) -> StepInFlight | None:
        """Schedule the next step and hand it to the ranks, without waiting.

        None: nothing has a row to run, or as many steps are in flight as may be: :meth:`take` one first.
        """
        if len(self.in_flight) == _AHEAD or not self.scheduler.has_work:
            return None
        start = perf_counter()
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        scheduled = perf_counter()
        plan = self.plans.plan_for(batch)
        if self._tracer is not None:
            self._tracer.on_host("schedule", start, scheduled)
            self._tracer.on_host("plan", scheduled, perf_counter())
        step = StepInFlight(batch=batch, plan=plan, future=self.submit(batch, plan=plan, first_only=True))
        self.in_flight.append(step)
        return step

    def take(self) -> list[Request]:
        """Wait for the oldest step in flight; the requests that have got a token by it, or have ended.

        Raises:
            the first error of a rank; the step stays in flight, and every later call raises the same.
        """
        result = self.in_flight[0].future.result()[0]
        self.in_flight.popleft()
        start = perf_counter()
        touched = self.scheduler.commit(result.ids, result.logprobs, result.scores)
        if self._tracer is not None:
            self._tracer.on_host("commit", start, perf_counter())
        self._hold_for_masks([request for request in touched if request.mask_late])
        return list(dict.fromkeys([*touched, *self.settle()]))

    def settle(self) -> list[Request]:
        """Take in masks that have come late; those requests that have ended by that. Never waits."""
        ended = self.scheduler.settle() if self.scheduler.late else []
        for request in self.scheduler.late:
            assert request.guide is not None, "a mask is awaited of a guide"
            request.guide.when_ready(self.when_mask_comes)
        return ended

    def _hold_for_masks(self, requests: list[Request]) -> None:
        """Wait a little for the masks of this step's requests, so that those that run together stay together.

        The last is awaited first: masks are made in the order of their requests, so one wait is usually enough.
        """
        end = perf_counter() + min(_MASK_S + _MASK_EACH_S * len(requests), _MASK_MOST_S)
        for request in reversed(requests):
            assert request.guide is not None, "a mask is awaited of a guide"
            request.guide.wait(max(0.0, end - perf_counter()))

    def submit(
        self, batch: Batch, *, plan: Plan | None = None, keep_logits: bool = False, first_only: bool = False
    ) -> Future[list[StepResult]]:
        """Hand a batch to the ranks; the result lists one :class:`StepResult` per rank.

        ``plan``: None: the one of the plan cache. ``keep_logits``: with the whole rows of logits, on every rank.
        ``first_only``: rank 0's result is enough; all ranks choose the same ids.
        """
        if keep_logits:  # not the scheduler's batch: it writes where cached pages may be
            self.scheduler.forget_cached()
        plan = plan or self.plans.plan_for(batch, keep_logits=keep_logits)
        if self._observe is not None:
            self._observe(batch, plan)
        if self._tracer is not None and not self._tracer.full:
            return self._tracer.submit(batch, plan, keep_logits, self.scheduler.stats())
        if self._tracer is not None:
            self._tracer.passed()
        submit = self.ranks.submit_first if first_only else self.ranks.submit
        return submit(RankWorker.step, batch, plan, keep_logits)

    def instrument(self, make: Callable[[Worker], Wrap | Reader] | None, name: str = "") -> None:
        """Read every step of every rank from now on, or wrap them, or stop doing so.

        ``make`` is called on each rank; for ranks that are processes it is a function or class of a module. The
        result may have a ``readings()``, which :meth:`readings` calls. A reader reads replayed steps as it does
        others; with a wrapper, steps run op by op. Instruments of other names stay as they are.
        """
        if any(self.ranks.submit(RankWorker.instrument, make, name).result()):
            self._warmup.begin_again()

    def observe(self, call: Callable[[Batch, Plan], None] | None) -> None:
        """Call something with every step that is handed out from now on, or nothing any more."""
        self._observe = call

    def readings(self, name: str = "") -> list[Any]:
        """The readings of each rank's instrument since the last call."""
        return self.ranks.submit(RankWorker.readings, name).result()

    def trace_with(self, tracer: StepTracer | None) -> None:
        """Hand out the next steps through ``tracer``, which replaces an earlier one. None: trace no more."""
        self._tracer = tracer

    def run_plan(self, batch: Batch, plan: Plan) -> list[StepResult]:
        """Run one batch under a given plan, and wait; every rank's result, with logits.

        The batch is the caller's own, so it overwrites pages that the scheduler has cached.
        """
        return self.submit(batch, plan=plan, keep_logits=True).result()

    def run_op_by_op(self, batch: Batch, plan: Plan) -> list[StepResult]:
        """As :meth:`run_plan`, with every operation called from Python: no captured step is made or replayed."""
        self.scheduler.forget_cached()
        return self.ranks.submit(RankWorker.step_op_by_op, batch, plan).result()

    def capture(self, batch: Batch, plan: Plan) -> None:
        """Have the ranks capture, as a server that is idle does, the decode step of ``plan`` that has as many rows as
        ``batch``: by a warm-up step."""
        dummies = warmup_batch(batch.group_rows, self.resolved.limits.page_size, drawn=batch.needs_logits)
        self.ranks.submit(RankWorker.warm_up, dummies, plan).result()

    def close(self) -> None:
        """End the ranks."""
        self.ranks.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ranks.__exit__(kind, error, trace)


def _make_worker(
    comm: Communicator,
    *,
    resolved: Resolved,
    source: WeightSource | None,
    fields: dict[str, Field],
    wrap: Callable[[Worker], Wrap] | None,
    validate: bool,
) -> Worker:
    rank_context = RankContext(
        mesh=resolved.mesh,
        rank=comm.rank,
        sharding=resolved.sharding,
        dtype=resolved.dtype,
        device=comm.device,
        num_slots=resolved.num_slots,
        num_positions=resolved.limits.max_context,
        batch_invariant=resolved.engine_config.batch_invariant,
        quantization=Quantization(resolved.engine_config.quantization),
    )
    return Worker(
        comm,
        resolved.config,
        source or resolved.weights(),
        rank_context,
        fields,
        page_size=resolved.limits.page_size,
        wrap=wrap,
        validate=validate,
    )
