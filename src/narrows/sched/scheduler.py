"""The scheduler of all ranks: decides which rows of which requests run in the next step. It is deterministic.

One scheduler sees all attention groups, so no rank decides anything. Each step takes one row of every running request
(its token may be a reference to the previous step's sample) and fills the rest of the row budget with chunks of
prompts, shared over the groups that have any (:mod:`narrows.sched.prompt_rows`), by turn. A request is admitted when
its turn comes within the budget (:mod:`narrows.sched.queue`), to the group that then has the least to compute, of those
with room for its tokens (:mod:`narrows.sched.group_routing`). It takes more pages as it grows. When a group's pages run
out, its request with the last turn is put back and begins again later, with what it has generated. Where several
clients compete, turns are by fair shares (:mod:`narrows.sched.shares`), and requests beyond their client's share are
put back for one of a client that runs fewer. ``docs/scheduling.md`` has the rules.

:meth:`schedule` may run ahead: it can be called again before :meth:`commit` has brought the samples of the step before.
A request that turns out to have ended by then has one row too many in flight; its sample is dropped. Ranks run steps in
order, so a page given away is overwritten only after every row in flight has used it, and a cached page is read only
after the step that wrote it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from narrows.sched.accepting import accept
from narrows.sched.batch import Batch, Chunk
from narrows.sched.budget import PromptBudget, fixed_budget
from narrows.sched.chunks import next_chunk, next_rows
from narrows.sched.integrity import check_integrity
from narrows.sched.limits import Limits
from narrows.sched.prompt_rows import share_rows
from narrows.sched.queue import WaitingQueue
from narrows.sched.request import Request
from narrows.sched.request_table import RequestTable
from narrows.sched.sampling import Logprobs, TokenScore
from narrows.sched.stats import Bound, SchedulerStats, Totals

__all__ = ["Limits", "Request", "Scheduler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """Expected results of a step in flight: samples, and scores of prompt tokens, by slot."""

    samples: tuple[tuple[Request, int], ...]
    scored: tuple[tuple[Request, range], ...]


class Scheduler:
    """Continuous batching over the attention groups of one engine. ``waiting`` is in the order of turns.

    ``prompt_budget`` bounds the rows of prompts in each step; by default ``limits.prompt_rows`` does.
    """

    def __init__(self, limits: Limits, prompt_budget: PromptBudget | None = None) -> None:
        self.limits = limits
        self._prompt_budget = prompt_budget or fixed_budget(limits.prompt_rows)
        self._totals = Totals(limits.num_groups)
        self._table = table = RequestTable(limits, self._totals)
        self.waiting, self.running, self.pools, self.shares = (
            table.waiting,
            table.running,
            table.pools,
            table.shares,
        )
        self._queue = WaitingQueue(table, self._totals)
        self.late: list[Request] = []
        """Guided requests whose next mask is not there yet; :meth:`settle` looks again."""
        self._ended: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._steps_held = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting) or any(self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: it can never run: an empty prompt, more tokens than the context or a group's cache holds,
            ``min_tokens`` above ``max_tokens``, a priority out of range, a guide that allows no token.
        """
        self.check(request)
        request.arrival = self._num_added
        request.turn = (self._totals.steps + request.priority * self.limits.aging_steps, request.arrival)
        self._num_added += 1
        self._table.wait(request)
        self._see_mask(request)

    def check(self, request: Request) -> None:
        """Cut its ``max_tokens`` to the context, and see whether it can run here. Any thread may ask.

        Raises:
            ConfigError: as :meth:`add`.
        """
        accept(request, self.limits)

    # -- the next step -------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None when no request has a row to run: while there is work, because samples or masks are
        awaited."""
        assert len(self._in_flight) <= 1, "a token can refer to the previous step's samples only: commit a step first"
        chunks: list[list[Chunk]] = [[] for _ in self.running]
        self._totals.begin_step()
        self._queue.make_room()
        left = self._decode(chunks, self.limits.rows_per_step)
        budget = min(left, self._prompt_budget([len(group) for group in chunks], left))
        self._queue.admit(budget)
        self._prefill(chunks, budget)
        batch = Batch(groups=tuple(tuple(group) for group in chunks), ended=tuple(self._ended))
        if batch.num_rows == 0:
            return None
        self._ended.clear()
        self._fly(batch)
        return batch

    def _decode(self, chunks: list[list[Chunk]], budget: int) -> int:
        """A row of every request that only has its newest sample to run; returns the rest of the budget."""
        order = self._table.order()
        rows, taken = self.shares.row_shares(order), Counter[str]()
        for request in [each for each in order if each.prefilled and each.wants_rows]:
            if budget <= (0 if taken[request.client] < rows.most else rows.kept):
                self._totals.binds(Bound.ROWS)
                continue
            if request.group >= 0 and self._table.grow(request, order):  # else it has been put back
                chunks[request.group].append(self._chunk(request, 1))
                taken[request.client] += 1
                budget -= 1
        return budget

    def _prefill(self, chunks: list[list[Chunk]], budget: int) -> None:
        requests = [request for request in self._table.order() if request.rows_left and request.wants_rows]
        if self._holds_back(requests, any(chunks)):
            return
        size = self.limits.page_size
        # One that left its row to prompts takes a page when it has a row.
        able = [each for each in requests if not each.prefilled or len(each.pages) * size > each.num_cached]
        shared = share_rows(self.shares.waves(able), budget, self.limits)
        for request in able:
            left = shared.get(request, 0)
            if left < request.rows_left and not request.scores_prompt:
                self._totals.binds(Bound.ROWS)
            while left:
                rows = next_rows(request, left, self.limits)
                chunks[request.group].append(self._chunk(request, rows))
                left -= rows

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
            self._totals.begun(request)
        return next_chunk(request, rows, self.limits)

    def _fly(self, batch: Batch) -> None:
        """Count the step, and keep its expected results."""
        by_id = {request.id: request for requests in self.running for request in requests}
        flying = _InFlight(
            samples=tuple((by_id[number], slot) for number, slot in batch.samples()),
            scored=tuple((by_id[number], slots) for number, slots in batch.scored()),
        )
        for request, slot in flying.samples:
            request.num_sampled += 1
            request.last_slot = slot
        for number in {chunk.request for group in batch.groups for chunk in group}:
            self._table.register(by_id[number])
        self._in_flight.append(flying)
        self._totals.stepped(batch.group_rows)

    # -- its result ----------------------------------------------------------------------------------------------------

    def commit(
        self,
        sampled_ids: tuple[int, ...],
        logprobs: Mapping[int, Logprobs] | None = None,
        scores: Mapping[int, TokenScore] | None = None,
    ) -> list[Request]:
        """Take in the samples of the oldest step in flight; the requests that got a token or ended, in row order.

        ``sampled_ids`` holds one id per logit row of that step, ``logprobs`` those that rows requested, ``scores``
        those of every scored row.
        Requests that end leave, and their pages are free at once. A request that was preempted meanwhile still gets
        its token.
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
            if not request.max_tokens:  # its prompt was to be scored, and now is: its sample is dropped
                self._finish(request, "length")
                continue
            request.output.append(sampled_ids[slot])
            if logprobs is not None and slot in logprobs:
                request.logprobs.append(logprobs[slot])
            self._totals.output_tokens += 1
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
        """Whether its next mask is ready, and if so, whether it allows any token. Never waits for it."""
        if request.guide is None:
            return
        request.mask_late = not request.guide.ready
        if request.mask_late:
            self.late.append(request)
        elif not any(request.guide.allowed()):
            self._finish(request, "stop")  # the constraint is fulfilled

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, for ``reason``; its samples in flight are dropped."""
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
        self._table.leave(request)

    # -- what it knows of itself ---------------------------------------------------------------------------------------

    def forget_cached(self) -> None:
        """Find no page again that was written until now: something else writes into the ranks' caches."""
        for pool in self.pools:
            pool.forget()

    def stats(self) -> SchedulerStats:
        """Its numbers now."""
        totals = self._totals
        used = tuple(pool.num_used for pool in self.pools)
        return SchedulerStats(
            running=sum(len(group) for group in self.running),
            waiting=len(self.waiting),
            kv_pages=sum(pool.num_pages - 1 for pool in self.pools),
            kv_pages_used=sum(used),
            preemptions=sum(totals.preemptions),
            prompt_tokens=totals.prompt_tokens,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            output_tokens=totals.output_tokens,
            steps=totals.steps,
            idle_rows=tuple(totals.idle_rows),
            group_running=tuple(len(group) for group in self.running),
            group_kv_pages_used=used,
            group_preemptions=tuple(totals.preemptions),
            short_steps=tuple(totals.short_steps),
            bound_steps={str(bound): totals.bound_steps[bound] for bound in Bound},
        )

    def check_integrity(self) -> None:
        """Pages are free, cached, or held by running requests; found by what is in them; turns are in order."""
        check_integrity(self.limits, self.waiting, self.running, self.pools)
        for request in self.late:
            assert request.mask_late and not request.finish_reason, "a mask is awaited for no request"


def _ended_with(request: Request, token: int) -> str:
    """Why the request ends with this token, its newest; empty if it continues."""
    if token in request.eos_ids:
        return "stop"
    return "length" if len(request.output) >= request.max_tokens else ""
