"""Simulates the engine: the real scheduler, one step ahead, on a clock that advances by predicted step times.

It does what the loop of the service does (:mod:`narrows.service.loop`): take in new requests, commit the step that is
done, hand out the next one, notify callers. At most two steps are with the ranks. A request counts as a client,
unless the load names its client. Tokens are dummies, and texts are as long as they may be. Requests are sent as by
``narrows bench serve``: each at its time, with at most so many at once. Equal loads give equal runs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from narrows.errors import ConfigError
from narrows.plan.plan import Plan
from narrows.plan.report.explain import describe
from narrows.sched.batch import Batch
from narrows.sched.budget import PromptBudget
from narrows.sched.limits import Limits
from narrows.sched.request import Request
from narrows.sched.scheduler import Scheduler
from narrows.sched.stats import SchedulerStats
from narrows.sim.costs import StepCost, StepCosts
from narrows.sim.intake import AT_ONCE, Gate, Intake
from narrows.sim.running_slots import RunningSlots
from narrows.workload.arrivals import Ask
from narrows.workload.fairness import Fairness, by_client
from narrows.workload.figures import Answer, Figures, figures

__all__ = ["Outcome", "PlanUse", "simulate"]

_AHEAD = 2
"""Steps that the ranks have been given at most, as the engine has it."""
_DUMMY = 0
"""The token that every row samples."""
_OWN = 1 << 32
"""Tokens of a prompt that no other request has: each one's begin at another multiple."""
_SHARED = 1 << 62
"""Where the tokens of shared blocks begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanUse:
    """What was run of one phase in one way: how rows travel in most layers, in how many steps, for how long."""

    phase: str
    layout: str
    words: str
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One load's simulation. ``seconds``: the ranks' time by what it was for; ``sources``: by where it is known from.

    ``kv_pages_most``: most pages that requests held at once, all groups together. ``fairness``: how clients fared; None
    where each sent one request.
    """

    figures: Figures
    answers: tuple[Answer, ...]
    stats: SchedulerStats
    busy_s: float
    kv_pages_most: int
    seconds: dict[str, float]
    sources: dict[str, float]
    plans: tuple[PlanUse, ...]
    fairness: Fairness | None = None


@dataclass(slots=True)
class _Sent:
    """A request that is under way, and when its tokens came."""

    number: int
    request: Request
    sent_s: float
    pieces_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _InFlight:
    batch: Batch
    ends_s: float


def simulate(
    limits: Limits,
    costs: StepCosts,
    asks: Sequence[Ask],
    *,
    concurrency: int = 0,
    fair: bool = True,
    intake: Intake = AT_ONCE,
    watch: Callable[[Batch, StepCost], None] | None = None,
    prompt_budget: PromptBudget | None = None,
) -> Outcome:
    """Run a load to its end.

    A request that can never run here is answered with its error, as a server would.

    Args:
        concurrency: most requests at once (0: no limit).
        fair: False: the scheduler takes all requests for those of one client.
        intake: when requests that have been sent come to the scheduler.
        watch: called with every step as it is handed to the ranks.
        prompt_budget: bounds the rows of prompts in a step, in place of ``limits.prompt_rows``.
    """
    return _Run(limits, costs, asks, concurrency, fair, intake, watch, prompt_budget).outcome()


class _Run:
    """One load on its way; times are seconds from its begin."""

    def __init__(
        self,
        limits: Limits,
        costs: StepCosts,
        asks: Sequence[Ask],
        concurrency: int,
        fair: bool,
        intake: Intake,
        watch: Callable[[Batch, StepCost], None] | None,
        prompt_budget: PromptBudget | None,
    ) -> None:
        self._costs, self._asks, self._fair, self._watch = costs, asks, fair, watch
        self._arrival_s, self._gate = intake.arrival_s, Gate(intake)
        self._on_its_way: deque[_Sent] = deque()
        self._running_slots = RunningSlots() if any(ask.client for ask in asks) else None
        self._concurrency = concurrency or len(asks)
        self._scheduler = Scheduler(limits, prompt_budget)
        self._unsent = deque(sorted(range(len(asks)), key=lambda number: asks[number].at_s))
        self._sent: dict[int, _Sent] = {}
        self._answers: dict[int, Answer] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._now = self._free_s = 0.0  # the host's time, and when the ranks are done with all they have
        self._busy_s = 0.0
        self._kv_pages_most = 0
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._plans: dict[tuple[str, int], tuple[Plan, list[float]]] = {}

    def outcome(self) -> Outcome:
        while not self._is_over():
            worked = self._send() | self._admit()
            touched: list[Request] = []
            if self._in_flight and self._in_flight[0].ends_s <= self._now:
                touched, worked = self._take(), True
            worked |= self._push()
            for request in touched:  # after the ranks have been given work
                self._tell(request)
            if not worked:
                self._now = self._next_s()
        answers = tuple(self._answers[number] for number in sorted(self._answers))
        seconds: defaultdict[str, float] = defaultdict(float)
        sources: defaultdict[str, float] = defaultdict(float)
        for (what, source), part_s in self._seconds.items():
            seconds[what] += part_s
            sources[source] += part_s
        return Outcome(
            figures=figures(answers),
            answers=answers,
            stats=self._scheduler.stats(),
            busy_s=self._busy_s,
            kv_pages_most=self._kv_pages_most,
            seconds=dict(seconds),
            sources=dict(sources),
            plans=self._uses(),
            fairness=self._fairness(answers),
        )

    def _is_over(self) -> bool:
        return not (self._unsent or self._sent or self._in_flight)

    def _next_s(self) -> float:
        """When the next thing happens: a step ends, a request arrives, or one is sent because another has ended."""
        ends = self._in_flight[0].ends_s if self._in_flight else math.inf
        comes = self._asks[self._unsent[0]].at_s if self._unsent and len(self._sent) < self._concurrency else math.inf
        arrives = next((time for each in self._on_its_way if (time := self._arrives_s(each)) > self._now), math.inf)
        soonest = min(ends, comes, arrives)
        assert self._now < soonest < math.inf, "there is work, but nothing to wait for"
        return soonest

    # -- whoever asks --------------------------------------------------------------------------------------------------

    def _send(self) -> bool:
        """What comes now, as far as the concurrency allows."""
        sent = False
        while self._unsent and len(self._sent) < self._concurrency and self._asks[self._unsent[0]].at_s <= self._now:
            number = self._unsent.popleft()
            ask, sent = self._asks[number], True
            request = Request(
                id=number,
                prompt=_prompt(ask, number),
                max_tokens=ask.output_tokens,
                client=self._client(number) if self._fair else "",
            )
            self._sent[number] = _Sent(number, request, self._now)
            self._on_its_way.append(self._sent[number])
        return sent

    def _admit(self) -> bool:
        """Hand the scheduler the requests that have arrived, if it takes any now."""
        arrived = self._arrived()
        rows = sum(len(each.request.prompt) for each in arrived)
        if not arrived or not self._gate.is_open(rows, self._num_running()):
            return False
        for sent in arrived:
            self._on_its_way.popleft()
            try:
                self._scheduler.add(sent.request)
            except ConfigError as error:
                del self._sent[sent.number]
                self._answers[sent.number] = Answer(sent_s=sent.sent_s, ended_s=self._now, error=str(error))
        return True

    def _arrives_s(self, sent: _Sent) -> float:
        return sent.sent_s + self._arrival_s

    def _arrived(self) -> list[_Sent]:
        return list(takewhile(lambda sent: self._arrives_s(sent) <= self._now, self._on_its_way))

    def _num_running(self) -> int:
        return sum(len(group) for group in self._scheduler.running)

    def _client(self, number: int) -> str:
        return self._asks[number].client or f"request {number}"

    def _tell(self, request: Request) -> None:
        sent = self._sent[request.id]
        sent.pieces_s.append(self._now)
        if not request.finish_reason:
            return
        del self._sent[request.id]
        self._answers[sent.number] = Answer(
            sent_s=sent.sent_s,
            ended_s=self._now,
            pieces_s=tuple(sent.pieces_s),
            input_tokens=len(request.prompt),
            output_tokens=len(request.output),
            cached_tokens=request.num_cached_prompt,
        )

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _push(self) -> bool:
        """Schedule the next step and hand it to the ranks, which begin it when they are done with the one before."""
        if len(self._in_flight) == _AHEAD or not self._scheduler.has_work:
            return False
        batch = self._scheduler.schedule()
        if batch is None:
            return False
        cost = self._costs.cost(batch)
        self._free_s = max(self._free_s, self._now) + cost.seconds
        self._in_flight.append(_InFlight(batch, self._free_s))
        self._gate.begun(prompts=batch.phase == "prefill", waiting=bool(self._arrived()))
        self._note(batch, cost)
        return True

    def _take(self) -> list[Request]:
        """Commit the oldest step; the requests that have got a token by it."""
        batch = self._in_flight.popleft().batch
        return self._scheduler.commit((_DUMMY,) * batch.num_logit_rows)

    # -- what is kept of it --------------------------------------------------------------------------------------------

    def _note(self, batch: Batch, cost: StepCost) -> None:
        self._busy_s += cost.seconds
        for part, seconds in cost.parts.items():
            self._seconds[part] += seconds
        self._kv_pages_most = max(self._kv_pages_most, sum(pool.num_used for pool in self._scheduler.pools))
        if self._running_slots is not None:
            running = Counter(self._client(each.id) for group in self._scheduler.running for each in group)
            waiting = Counter(self._client(each.id) for each in self._scheduler.waiting)
            self._running_slots.note(cost.seconds, running, waiting)
        if cost.plan is not None:
            _, used = self._plans.setdefault((batch.phase, id(cost.plan)), (cost.plan, [0, 0.0]))
            used[0] += 1
            used[1] += cost.seconds
        if self._watch is not None:
            self._watch(batch, cost)

    def _fairness(self, answers: Sequence[Answer]) -> Fairness | None:
        if self._running_slots is None:
            return None
        parts = self._running_slots.parts
        return Fairness(
            jain=self._running_slots.jain,
            least=min(parts, default=1.0),
            clients=len(parts),
            by_client=by_client(self._asks, answers),
        )

    def _uses(self) -> tuple[PlanUse, ...]:
        """The plans by what they do, the longest first."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for (phase, _), (plan, (steps, seconds)) in self._plans.items():
            used = found.setdefault((phase, plan.layout_name, describe(plan)), [0, 0.0])
            used[0] += steps
            used[1] += seconds
        uses = (
            PlanUse(phase=phase, layout=layout, words=words, steps=round(steps), seconds=seconds)
            for (phase, layout, words), (steps, seconds) in found.items()
        )
        return tuple(sorted(uses, key=lambda use: -use.seconds))


def _prompt(ask: Ask, number: int) -> tuple[int, ...]:
    """Tokens of which only those are equal that are in the prompts of :func:`narrows.workload.arrivals.prompt_ids`."""
    tokens: list[int] = []
    for which, count in ask.blocks:
        begin = _SHARED + which % (1 << 29) * _OWN
        tokens.extend(range(begin, begin + count))
    own = ask.input_tokens - len(tokens)
    tokens.extend(range((number + 1) * _OWN, (number + 1) * _OWN + max(own, 0)))
    return tuple(tokens[: ask.input_tokens])
