"""The scheduler of all ranks: which rows of which requests run in the next step. Ints only; pure and deterministic.

One scheduler sees all attention groups, so no rank decides anything. Each step takes one row of every running request
(its token may be a reference to the previous step's sample) and fills the rest of the row budget with chunks of what
has to be prefilled, by turn. A request is admitted when its turn comes within the budget and a group has room for the
tokens it has (:mod:`narrows.sched.admission`); it takes more pages as it grows. When a group's pages run out, its
request with the last turn is put back and begins again later, with what it has generated. Where several clients
compete, turns are by fair shares (:mod:`narrows.sched.shares`), and requests beyond their client's share are put back
for one of a client that runs fewer. ``docs/scheduling.md`` says the rules in words.

:meth:`schedule` may run ahead: it can be called again before :meth:`commit` has brought the samples of the step before.
A request that turns out to have ended by then has one row too many in flight; its sample is dropped. Ranks run steps in
order, so a page given away is overwritten only after every row in flight has used it, and a cached page is read only
after the step that wrote it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from narrows.errors import ConfigError
from narrows.sched.admission import Place, choose_place, choose_yielding
from narrows.sched.batch import Batch, Chunk
from narrows.sched.chunks import next_chunk, next_rows
from narrows.sched.integrity import check_integrity
from narrows.sched.limits import MOST_PRIORITY, Limits
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.request import Request
from narrows.sched.sampling import Logprobs, TokenScore
from narrows.sched.shares import Shares
from narrows.sched.stats import SchedulerStats

__all__ = ["Limits", "Request", "Scheduler"]

_TURN = attrgetter("turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """What a step that the host has not seen yet will bring: samples, and scores of prompt tokens, by slot."""

    samples: tuple[tuple[Request, int], ...]
    scored: tuple[tuple[Request, range], ...]


class Scheduler:
    """Continuous batching over the attention groups of one engine. ``waiting`` is in the order of turns."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Request] = []
        self.running: list[list[Request]] = [[] for _ in range(limits.num_groups)]
        self.pools = [PagePool(limits.pages_per_group) for _ in range(limits.num_groups)]
        self.shares = Shares(limits)
        self.late: list[Request] = []
        """Guided requests whose next mask is not there yet; :meth:`settle` looks again."""
        self._ended: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._steps_held = 0
        self._num_added = self._num_steps = self._num_preempted = 0
        self._prompt_tokens = self._cached_prompt_tokens = self._output_tokens = 0
        self._idle_rows = [0] * limits.num_groups

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting) or any(self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: it can never run: an empty prompt, more tokens than the context or a group's cache holds, more
                tokens asked for at least than at most, a priority out of range, a guide that allows no token.
        """
        self.check(request)
        request.arrival = self._num_added
        request.turn = (self._num_steps + request.priority * self.limits.aging_steps, request.arrival)
        self._num_added += 1
        insort(self.waiting, request, key=_TURN)
        self.shares.came(request)
        self._see_mask(request)

    def check(self, request: Request) -> None:
        """Cut its ``max_tokens`` to the context, and see whether it can run here. Any thread may ask.

        Raises:
            ConfigError: as :meth:`add`.
        """
        limits = self.limits
        if not request.prompt:
            raise ConfigError("the prompt is empty: it needs at least one token")
        least = 0 if request.scores_prompt else 1
        if request.max_tokens < least:
            raise ConfigError(f"max_tokens is {request.max_tokens}; it must be at least {least}")
        if request.sampling is not None and request.sampling.min_tokens > request.max_tokens:
            raise ConfigError(
                f"min_tokens is {request.sampling.min_tokens}; it must be at most max_tokens, {request.max_tokens}"
            )
        if not -MOST_PRIORITY <= request.priority <= MOST_PRIORITY:
            raise ConfigError(
                f"the priority is {request.priority}; it must be between {-MOST_PRIORITY} and {MOST_PRIORITY}"
            )
        answer = min(request.max_tokens, 1)
        if len(request.prompt) + answer > limits.max_context:
            left = " and at least 1 must be left for the answer" if answer else ""
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, but the context holds {limits.max_context}{left}; "
                f"shorten it to {limits.max_context - answer} tokens or raise --max-context"
            )
        request.max_tokens = min(request.max_tokens, limits.max_context - len(request.prompt))
        if request.most_tokens > limits.tokens_per_group:
            raise ConfigError(
                f"the request needs KV cache for {request.most_tokens} tokens, but a group has "
                f"{limits.tokens_per_group}; ask for fewer tokens or raise --kv-tokens to {request.most_tokens}"
            )
        if request.guide is not None and request.guide.ready and not any(request.guide.allowed()):
            raise ConfigError("the constraint on the answer allows no first token; change it")

    # -- the next step -------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None when no request has a row to run: while there is work, because samples or masks are
        awaited."""
        assert len(self._in_flight) <= 1, "a token can refer to the previous step's samples only: commit a step first"
        chunks: list[list[Chunk]] = [[] for _ in self.running]
        self._make_room()
        budget = self._decode(chunks, self.limits.rows_per_step)
        if any(chunks) and self.limits.prompt_rows:
            budget = min(budget, self.limits.prompt_rows)
        self._admit(budget)
        self._prefill(chunks, budget)
        batch = Batch(groups=tuple(tuple(group) for group in chunks), ended=tuple(self._ended))
        if batch.num_rows == 0:
            return None
        self._ended.clear()
        self._fly(batch)
        return batch

    def _order(self, *more: Request) -> list[Request]:
        """The running requests, and ``more`` as if they ran, in the order in which they get rows."""
        return self.shares.order([*(request for group in self.running for request in group), *more])

    def _decode(self, chunks: list[list[Chunk]], budget: int) -> int:
        """A row of every request that only has its newest sample to run; what is left of the budget."""
        order = self._order()
        rows, taken = self.shares.row_shares(order), Counter[str]()
        for request in [each for each in order if each.prefilled and each.wants_rows]:
            if budget <= (0 if taken[request.client] < rows.most else rows.kept):
                continue
            if request.group >= 0 and self._grow(request, order):  # else it has been put back
                chunks[request.group].append(self._chunk(request, 1))
                taken[request.client] += 1
                budget -= 1
        return budget

    def _grow(self, request: Request, order: Sequence[Request]) -> bool:
        """Pages for its next row; False if it was put back for want of them.

        Whoever is put back comes later in the order than all that have rows in this step, as those are served by it.
        """
        pool = self.pools[request.group]
        count = num_pages_for(request.num_cached + 1, self.limits.page_size) - len(request.pages)
        if count > pool.num_free:
            for other in self.running[request.group]:
                if other.is_through:  # nothing of it is to run: its pages serve nobody
                    self._release(other)
        while count > pool.num_free:
            last = next(other for other in reversed(order) if other.group == request.group and not other.is_through)
            self._put_back(last)
            if last is request:
                return False
        request.pages += pool.take(count)
        return True

    def _make_room(self) -> None:
        """Place requests of clients that run fewer than others; if need be, others' are put back for them.

        Before anybody has rows, so that whoever is put back has none in this step.
        """
        while self.shares.compete and (found := self._next_in_line(None)) is not None:
            request, order = found
            may_yield = [other for other in reversed(order) if self._yields(other, request)]
            if not may_yield:
                return
            place = choose_place(request, self.pools, self.running, self.limits)
            if place is None:
                for other in choose_yielding(request, may_yield, self.pools, self.running, self.limits):
                    self._put_back(other)
                place = choose_place(request, self.pools, self.running, self.limits)
            if place is None:
                return
            self._place(request, place)

    def _yields(self, running: Request, waiting: Request) -> bool:
        """Whether it may be put back for the other: its client keeps as many as the other's client then has, or more.

        Never for one that is less urgent.
        """
        fewest = self.shares.running(waiting.client) + 1
        return running.rank >= fewest and running.priority >= waiting.priority and not running.is_through

    def _admit(self, budget: int) -> None:
        """Give waiting requests a place, by turn, as long as the step has room for a row of them."""
        while (found := self._next_in_line(budget)) is not None:
            request, _ = found
            place = choose_place(request, self.pools, self.running, self.limits)
            if place is None:
                return  # nobody passes it
            self._place(request, place)

    def _next_in_line(self, budget: int | None) -> tuple[Request, list[Request]] | None:
        """The waiting request whose turn it is, and the order with it among those that run; None: no row is left.

        ``budget``: rows for prompts; None: what fair shares leave of the next step's.
        """
        scores_wait = False
        while True:
            request = self.shares.first(each for each in self.waiting if not (scores_wait and each.scores_prompt))
            if request is None:
                return None
            request.since = self.shares.since(request)
            order = self._order(request)
            plain, scored = _rows_ahead(order, request)
            rows = self.shares.row_shares(order).for_prompts if budget is None else budget
            if plain + min(scored, self.limits.scored_rows) >= rows:
                return None
            if not request.scores_prompt or scored < self.limits.scored_rows:
                return request, order
            scores_wait = True  # for the budget of those that score; for others there is room

    def _place(self, request: Request, place: Place) -> None:
        self.waiting.remove(request)
        pool = self.pools[place.group]
        pool.share(place.found)
        count = num_pages_for(request.num_tokens, self.limits.page_size) - len(place.found)
        request.group, request.pages = place.group, [*place.found, *pool.take(count)]
        request.num_registered = len(place.found)
        request.num_found = request.num_cached = len(place.found) * self.limits.page_size
        insort(self.running[place.group], request, key=_TURN)
        self.shares.placed(request)

    def _prefill(self, chunks: list[list[Chunk]], budget: int) -> None:
        requests = [request for request in self._order() if request.rows_left and request.wants_rows]
        if self._holds_back(requests, any(chunks)):
            return
        scored = self.limits.scored_rows
        for request in requests:
            if request.prefilled and num_pages_for(request.num_cached + 1, self.limits.page_size) > len(request.pages):
                continue  # it left its row to prompts, and takes a page when it has one
            room = min(budget, scored) if request.scores_prompt else budget
            while request.rows_left and (rows := next_rows(request, room, self.limits)):
                chunks[request.group].append(self._chunk(request, rows))
                budget, room = budget - rows, room - rows
                scored -= rows if request.scores_prompt else 0
            if not request.rows_left:
                continue
            if not request.scores_prompt or budget <= scored:
                break  # no room, or too little for a chunk that may not be cut: first come, first served
            scored = 0  # those behind it that score wait too; for others there is room

    def _holds_back(self, requests: list[Request], others_run: bool) -> bool:
        """Whether prompts of one group wait for some of another, as every group waits for one that prefills."""
        hold = (
            self.limits.num_groups > 1
            and others_run
            and len({request.group for request in requests}) == 1
            and all(request.num_cached == request.num_found for request in requests)  # none is under way
            and self._steps_held < self.limits.align_steps
        )
        self._steps_held = self._steps_held + 1 if hold else 0
        return hold

    def _chunk(self, request: Request, rows: int) -> Chunk:
        if request.num_fed == 0:
            request.num_cached_prompt = request.num_cached
            self._prompt_tokens += len(request.prompt)
            self._cached_prompt_tokens += request.num_cached
        return next_chunk(request, rows, self.limits)

    def _fly(self, batch: Batch) -> None:
        """Count the step, and keep what it will bring."""
        by_id = {request.id: request for requests in self.running for request in requests}
        flying = _InFlight(
            samples=tuple((by_id[number], slot) for number, slot in batch.samples()),
            scored=tuple((by_id[number], slots) for number, slots in batch.scored()),
        )
        for request, slot in flying.samples:
            request.num_sampled += 1
            request.last_slot = slot
        for number in {chunk.request for group in batch.groups for chunk in group}:
            self._register(by_id[number])
        self._in_flight.append(flying)
        self._num_steps += 1
        most = max(batch.group_rows)
        for group, rows in enumerate(batch.group_rows):
            self._idle_rows[group] += most - rows

    # -- its result ----------------------------------------------------------------------------------------------------

    def commit(
        self,
        sampled_ids: tuple[int, ...],
        logprobs: Mapping[int, Logprobs] | None = None,
        scores: Mapping[int, TokenScore] | None = None,
    ) -> list[Request]:
        """Take in the samples of the oldest step in flight; the requests that got a token or ended, in row order.

        ``sampled_ids`` holds one id per logit row of that step, ``logprobs`` what rows asked for, ``scores`` those of
        every scored row. Requests that end leave, and their pages are free at once. A request that was put back
        meanwhile gets its token all the same.
        """
        touched: list[Request] = []
        flying = self._in_flight.popleft()
        for request, slots in flying.scored:
            if not request.finish_reason:
                assert scores is not None, "rows were scored, but their scores are not here"
                request.prompt_logprobs += [scores[slot] for slot in slots]
        for request, slot in flying.samples:
            if request.finish_reason:
                continue  # it ended at the step before; this row was in flight already
            touched.append(request)
            if not request.max_tokens:  # its prompt was to be scored, and now is: the sample is nobody's
                self._finish(request, "length")
                continue
            request.output.append(sampled_ids[slot])
            if logprobs is not None and slot in logprobs:
                request.logprobs.append(logprobs[slot])
            self._output_tokens += 1
            if reason := _ended_with(request, sampled_ids[slot]):
                self._finish(request, reason)
            elif request.guide is not None:
                request.guide.advance(sampled_ids[slot])
                self._see_mask(request)
        return touched

    def settle(self) -> list[Request]:
        """Look again for masks that were late; those requests that ended because nothing may follow."""
        late, self.late = self.late, []
        for request in late:
            self._see_mask(request)
        return [request for request in late if request.finish_reason]

    def _see_mask(self, request: Request) -> None:
        """Whether its next mask is there, and if so, whether anything may follow. Never waits for it."""
        if request.guide is None:
            return
        request.mask_late = not request.guide.ready
        if request.mask_late:
            self.late.append(request)
        elif not any(request.guide.allowed()):
            self._finish(request, "stop")  # the constraint is fulfilled

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, for ``reason``; what it still has in flight is dropped."""
        if not request.finish_reason:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.guide is not None:
            request.guide.end()
        if request.mask_late:
            self.late.remove(request)
        if request.num_fed:
            self._ended.append(request.id)
        self.shares.ended(request, self._num_steps, ran=request.group >= 0)
        if request.group < 0:
            self.waiting.remove(request)
        else:
            self._release(request)
            self.running[request.group].remove(request)

    def _put_back(self, request: Request) -> None:
        """Give up its pages; it waits for its turn to run all its tokens again."""
        self._release(request)
        self.running[request.group].remove(request)
        request.group = -1
        request.num_cached = request.num_found = 0
        insort(self.waiting, request, key=_TURN)
        self._num_preempted += 1
        self.shares.put_back(request, self._num_steps)

    def _release(self, request: Request) -> None:
        self._register(request)
        self.pools[request.group].give_back(request.pages)
        request.pages = []
        request.num_registered = 0

    def _register(self, request: Request) -> None:
        """Let its full pages be found: those whose tokens are known, and whose rows have been scheduled all."""
        if not self.limits.prefix_cache or not request.pages:
            return
        num_full = min(request.num_cached, request.num_known) // self.limits.page_size
        hashes = request.hashes_of(num_full, self.limits.page_size)
        for page in range(request.num_registered, num_full):
            self.pools[request.group].register(request.pages[page], hashes[page])
        request.num_registered = max(request.num_registered, num_full)

    # -- what it knows of itself ---------------------------------------------------------------------------------------

    def forget_cached(self) -> None:
        """Find no page again that was written until now: something else writes into the ranks' caches."""
        for pool in self.pools:
            pool.forget()

    def stats(self) -> SchedulerStats:
        """Its numbers now."""
        return SchedulerStats(
            running=sum(len(group) for group in self.running),
            waiting=len(self.waiting),
            kv_pages=sum(pool.num_pages - 1 for pool in self.pools),
            kv_pages_used=sum(pool.num_used for pool in self.pools),
            preemptions=self._num_preempted,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            output_tokens=self._output_tokens,
            steps=self._num_steps,
            idle_rows=tuple(self._idle_rows),
        )

    def check_integrity(self) -> None:
        """Pages are free, cached, or held by running requests; found by what is in them; turns are in order."""
        check_integrity(self.limits, self.waiting, self.running, self.pools)
        for request in self.late:
            assert request.mask_late and not request.finish_reason, "a mask is awaited for no request"


def _rows_ahead(order: Sequence[Request], request: Request) -> tuple[int, int]:
    """Rows of prompts that come before it in the order: of those that are not scored, and of those that are."""
    ahead = [other for other in order[: order.index(request)] if other.rows_left and other.wants_rows]
    scored = sum(other.rows_left for other in ahead if other.scores_prompt)
    return sum(other.rows_left for other in ahead) - scored, scored


def _ended_with(request: Request, token: int) -> str:
    """Why the request ends with this token, its newest; empty if it goes on."""
    if token in request.eos_ids:
        return "stop"
    return "length" if len(request.output) >= request.max_tokens else ""
