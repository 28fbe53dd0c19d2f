"""The scheduler of all ranks: which rows of which requests run in the next step. Ints only; pure and deterministic.

One scheduler sees all attention groups, so no rank decides anything. Each step takes one row of every running request
(its token may be a reference to the previous step's sample) and fills the rest of the row budget with chunks of
prompts, first come first served; they are cut where the budget ends, or only at fixed places. A request is admitted
only when pages for its prompt and all tokens it may generate are free, so a running request never has to be put back.
It goes to the group with the fewest tokens in pages. Prompts whose tokens are scored have a budget of their own on top,
since each of their rows holds logits.

:meth:`schedule` may run ahead: it can be called again before :meth:`commit` has brought the samples of the step before.
A request that turns out to have ended by then has one row too many in flight; its sample is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from narrows.errors import ConfigError
from narrows.sched.batch import Batch, Chunk, sample_ref
from narrows.sched.guide import Guide
from narrows.sched.pages import PagePool, num_pages_for
from narrows.sched.sampling import Logprobs, SamplingParams, TokenScore

__all__ = ["Limits", "Request", "Scheduler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step and the cache may hold. ``pages_per_group`` counts the null page along.

    ``prefill_chunk``: if not 0, prompts are cut at its multiples and nowhere else, whatever else is in a step.
    ``scored_rows_per_step``: most rows of scored prompts in a step, at least one such chunk; 0: as many as rows.

    Raises:
        ConfigError: a step that cannot hold one such chunk.
    """

    num_groups: int = 1
    rows_per_step: int = 2048
    requests_per_group: int = 256
    page_size: int = 16
    pages_per_group: int = 512
    max_context: int = 2048
    prefill_chunk: int = 0
    scored_rows_per_step: int = 0

    def __post_init__(self) -> None:
        if self.rows_per_step < self.prefill_chunk:
            raise ConfigError(
                f"prompts are cut into chunks of {self.prefill_chunk} rows, but a step may hold {self.rows_per_step}; "
                f"raise --max-rows to at least {self.prefill_chunk}"
            )

    @property
    def tokens_per_group(self) -> int:
        """Tokens of KV cache that one group can hold."""
        return (self.pages_per_group - 1) * self.page_size


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt on its way to text. ``finish_reason`` is empty until it is ``stop`` or ``length``."""

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    sampling: SamplingParams | None = None
    priority: int = 0
    """Lower runs earlier."""
    guide: Guide | None = None
    """What may be generated; None: anything."""
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """One per token of ``output``, if ``sampling`` asks for them."""
    prompt_logprobs: list[TokenScore] = field(default_factory=list)
    """One per token of ``prompt`` from the second on, if ``sampling`` asks for them."""
    finish_reason: str = ""
    group: int = -1
    pages: tuple[int, ...] = ()
    num_cached: int = 0
    """Tokens whose rows have been scheduled: prompt tokens, and samples fed back."""
    num_sampled: int = 0
    """Samples that have been scheduled; those not yet in ``output`` are still on the ranks."""
    last_slot: int = -1
    """Where its newest sample stands among the samples of the step it was scheduled in."""

    @property
    def prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    @property
    def scores_prompt(self) -> bool:
        """Whether every token of the prompt is to be scored; then it need not generate any (``max_tokens`` 0)."""
        return self.sampling is not None and self.sampling.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """What a step that the host has not seen yet will bring: samples, and scores of prompt tokens, by slot."""

    samples: tuple[tuple[Request, int], ...]
    scored: tuple[tuple[Request, range], ...]


class Scheduler:
    """Continuous batching over the attention groups of one engine."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[list[Request]] = [[] for _ in range(limits.num_groups)]
        self.pools = [PagePool(limits.pages_per_group) for _ in range(limits.num_groups)]
        self._ended: list[int] = []
        self._in_flight: deque[_InFlight] = deque()

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting) or any(self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: it can never run: an empty prompt, or more tokens than the context or a group's cache holds.
        """
        limits = self.limits
        if not request.prompt:
            raise ConfigError("the prompt is empty: it needs at least one token")
        least = 0 if request.scores_prompt else 1
        if request.max_tokens < least:
            raise ConfigError(f"max_tokens is {request.max_tokens}; it must be at least {least}")
        answer = min(request.max_tokens, 1)
        if len(request.prompt) + answer > limits.max_context:
            left = " and at least 1 must be left for the answer" if answer else ""
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, but the context holds {limits.max_context}{left}; "
                f"shorten it to {limits.max_context - answer} tokens or raise --max-context"
            )
        request.max_tokens = min(request.max_tokens, limits.max_context - len(request.prompt))
        needed = self._tokens_needed(request)
        if needed > limits.tokens_per_group:
            raise ConfigError(
                f"the request needs KV cache for {needed} tokens, but a group has {limits.tokens_per_group}; "
                f"ask for fewer tokens or raise --kv-tokens to {needed}"
            )
        self.waiting.append(request)

    def _tokens_needed(self, request: Request) -> int:
        """Tokens that enter the cache: the prompt and every sample but the last."""
        return len(request.prompt) + max(request.max_tokens, 1) - 1

    def schedule(self) -> Batch | None:
        """The next step, or None when no request has a row to run."""
        assert len(self._in_flight) <= 1, "a token can refer to the previous step's samples only: commit a step first"
        self._admit()
        budget = self.limits.rows_per_step
        scored = self.limits.scored_rows_per_step or budget
        chunks: list[list[Chunk]] = [[] for _ in self.running]
        for group, requests in enumerate(self.running):
            for request in requests:
                if request.prefilled and request.num_sampled < request.max_tokens and budget > 0:
                    chunks[group].append(self._decode_chunk(request))
                    budget -= 1
        prefills = sorted(
            (request for requests in self.running for request in requests if not request.prefilled), key=lambda r: r.id
        )
        for request in prefills:
            room = min(budget, scored) if request.scores_prompt else budget
            while not request.prefilled and (rows := self._prefill_rows(request, room)):
                chunks[request.group].append(self._prefill_chunk(request, rows))
                budget, room = budget - rows, room - rows
                scored -= rows if request.scores_prompt else 0
            if request.prefilled:
                continue
            if not request.scores_prompt or budget <= scored:
                break  # no room, or too little for a chunk that may not be cut: first come first served
            scored = 0  # those behind it that score wait too; for others there is room
        batch = Batch(groups=tuple(tuple(group) for group in chunks), ended=tuple(self._ended))
        if batch.num_rows == 0:
            return None
        self._ended.clear()
        by_id = {request.id: request for requests in self.running for request in requests}
        flying = _InFlight(
            samples=tuple((by_id[number], slot) for number, slot in batch.samples()),
            scored=tuple((by_id[number], slots) for number, slots in batch.scored()),
        )
        for request, slot in flying.samples:
            request.num_sampled += 1
            request.last_slot = slot
        self._in_flight.append(flying)
        return batch

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            pages = num_pages_for(self._tokens_needed(request), self.limits.page_size)
            able = [
                group
                for group, pool in enumerate(self.pools)
                if pool.num_free >= pages and len(self.running[group]) < self.limits.requests_per_group
            ]
            if not able:
                return
            group = max(able, key=lambda g: (self.pools[g].num_free, -g))
            self.waiting.popleft()
            request.group, request.pages = group, self.pools[group].take(pages)
            self.running[group].append(request)

    def _decode_chunk(self, request: Request) -> Chunk:
        known = request.num_sampled == len(request.output)
        token = request.output[-1] if known else sample_ref(request.last_slot)
        start = request.num_cached
        request.num_cached += 1
        return Chunk(
            request=request.id,
            start=start,
            tokens=(token,),
            pages=self._pages(request, start + 1),
            num_logits=1,
            sampling=request.sampling,
            num_prompt=len(request.prompt),
        )

    def _prefill_rows(self, request: Request, budget: int) -> int:
        """Rows of a prompt's next chunk in a step that has room for ``budget``; 0: none now."""
        rows = len(request.prompt) - request.num_cached
        size = self.limits.prefill_chunk
        if not size:
            return min(rows, budget)
        rows = min(rows, size)  # chunks begin at multiples of the size, since all before were whole
        return rows if rows <= budget else 0

    def _prefill_chunk(self, request: Request, rows: int) -> Chunk:
        start = request.num_cached
        stop = request.num_cached = start + rows
        targets = request.prompt[start + 1 : stop + 1] if request.scores_prompt else ()
        return Chunk(
            request=request.id,
            start=start,
            tokens=request.prompt[start:stop],
            pages=self._pages(request, stop),
            num_logits=len(targets) + (1 if request.prefilled else 0),
            sampling=request.sampling,
            num_prompt=len(request.prompt),
            targets=targets,
        )

    def _pages(self, request: Request, num_tokens: int) -> tuple[int, ...]:
        return request.pages[: num_pages_for(num_tokens, self.limits.page_size)]

    def commit(
        self,
        sampled_ids: tuple[int, ...],
        logprobs: Mapping[int, Logprobs] | None = None,
        scores: Mapping[int, TokenScore] | None = None,
    ) -> list[Request]:
        """Take in the samples of the oldest step in flight; the requests that got a token or ended, in row order.

        ``sampled_ids`` holds one id per logit row of that step, ``logprobs`` what rows asked for, ``scores`` those of
        every scored row. Requests that end leave, and their pages are free at once: ranks run steps in order, so a row
        still in flight writes before anything that reuses its page.
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
            if not request.max_tokens:  # its prompt was to be scored, and now is: the sample is nobody's
                touched.append(request)
                self._finish(request, "length")
                continue
            token = sampled_ids[slot]
            request.output.append(token)
            if logprobs is not None and slot in logprobs:
                request.logprobs.append(logprobs[slot])
            touched.append(request)
            if token in request.eos_ids:
                self._finish(request, "stop")
            elif len(request.output) >= request.max_tokens:
                self._finish(request, "length")
        return touched

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, for ``reason``; what it still has in flight is dropped."""
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish_reason = reason
        elif not request.finish_reason:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.running[request.group].remove(request)
        self._ended.append(request.id)
        self.pools[request.group].give_back(request.pages)
        request.pages = ()

    def check_integrity(self) -> None:
        """Every page is free or held by exactly one running request; nothing that ended holds any."""
        for group, pool in enumerate(self.pools):
            pool.check_integrity()
            held = [page for request in self.running[group] for page in request.pages]
            assert len(set(held)) == len(held), "a page is held twice"
            assert len(held) + pool.num_free == pool.num_pages - 1, "a page is lost"
