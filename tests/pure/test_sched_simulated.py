"""The scheduler against a simulated model: whatever arrives, ends early or is taken out, every output is the right one.

The model's next token is a hash of all tokens before it, which it reads from a paged cache through the page tables of
the batch, as a rank does, and holds against the request's true text, token by token. So a page wrongly shared, found or
given away, a lost or doubled row, or a reference to another sample is seen in the step that reads it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from random import Random

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from narrows.sched.batch import Batch, sample_slot
from narrows.sched.pages import num_pages_for
from narrows.sched.sampling import SamplingParams, TokenScore
from narrows.sched.scheduler import Limits, Request, Scheduler

VOCAB = 13
EOS = frozenset({0, 1})


def next_token(tokens: tuple[int, ...]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def mark(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens))


def score(tokens: tuple[int, ...]) -> TokenScore:
    """That of the last token, after all before it."""
    return TokenScore(float(zlib.crc32(bytes(tokens))), len(tokens), ())


def plain_loop(prompt: tuple[int, ...], max_tokens: int, eos_ids: frozenset[int] = EOS) -> tuple[list[int], str]:
    tokens = prompt
    for _ in range(max_tokens):
        tokens += (next_token(tokens),)
        if tokens[-1] in eos_ids:
            return list(tokens[len(prompt) :]), "stop"
    return list(tokens[len(prompt) :]), "length"


class Ranks:
    """Ranks in ints: write each row to its slot, then read the context back by the pages.

    A row holds the token and a mark of all tokens before it, as KV depends on those too.
    """

    def __init__(self, limits: Limits) -> None:
        self.page_size = limits.page_size
        self.cache: list[dict[int, tuple[int, int]]] = [{} for _ in range(limits.num_groups)]
        self.samples: tuple[int, ...] = ()
        self.texts: dict[int, tuple[int, ...]] = {}  # by request: the prompt and all that follows in the plain loop

    def run(self, batch: Batch) -> tuple[tuple[int, ...], dict[int, TokenScore]]:
        sampled: list[int] = []
        scores: dict[int, TokenScore] = {}
        for cache, group in zip(self.cache, batch.groups, strict=True):
            for chunk in group:
                slots = [page * self.page_size + i for page in chunk.pages for i in range(self.page_size)]
                stop = chunk.start + len(chunk.tokens)
                context = [cache[slot][0] for slot in slots[: chunk.start]]
                for slot, token in zip(slots[chunk.start :], chunk.tokens, strict=False):
                    context.append(self.samples[sample_slot(token)] if token < 0 else token)
                    cache[slot] = (context[-1], mark(context))
                text = self.texts[chunk.request]
                for i, slot in enumerate(slots[:stop]):
                    assert cache[slot] == (text[i], mark(text[: i + 1])), "a page holds something else"
                first = stop - chunk.num_logits + 1
                for end in range(first, stop + 1):
                    seen = tuple(cache[slot][0] for slot in slots[:end])
                    if end - first < len(chunk.targets):
                        scores[len(sampled)] = score((*seen, chunk.targets[end - first]))
                    sampled.append(next_token(seen))
        self.samples = tuple(sampled)
        return self.samples, scores


class Serving(RuleBasedStateMachine):
    """An engine whose host and ranks take their turns at random; at the end all requests are run out."""

    @initialize(
        num_groups=st.integers(1, 3),
        rows_per_step=st.integers(1, 9),
        requests_per_group=st.integers(1, 3),
        page_size=st.integers(1, 4),
        num_pages=st.integers(2, 12),
        max_context=st.integers(2, 24),
        prefill_chunk=st.integers(0, 4),
        scored_rows=st.integers(0, 5),
        prefix_cache=st.booleans(),
        aging_steps=st.integers(0, 3),
        decode_weight=st.integers(0, 12),
        align_steps=st.integers(0, 3),
    )
    def begin(
        self,
        num_groups: int,
        rows_per_step: int,
        requests_per_group: int,
        page_size: int,
        num_pages: int,
        max_context: int,
        prefill_chunk: int,
        scored_rows: int,
        prefix_cache: bool,
        aging_steps: int,
        decode_weight: int,
        align_steps: int,
    ) -> None:
        self.limits = Limits(
            num_groups=num_groups,
            rows_per_step=rows_per_step,
            requests_per_group=requests_per_group,
            page_size=page_size,
            pages_per_group=num_pages,
            max_context=min(max_context, (num_pages - 1) * page_size + 1),
            prefill_chunk=min(prefill_chunk, rows_per_step),
            scored_rows_per_step=max(scored_rows, min(prefill_chunk, rows_per_step)),
            prefix_cache=prefix_cache,
            aging_steps=aging_steps,
            decode_weight=decode_weight,
            align_steps=align_steps,
        )
        self.scheduler = Scheduler(self.limits)
        self.ranks = Ranks(self.limits)
        self.requests: list[Request] = []
        self.cached: dict[int, int] = {}
        self.unrun: deque[Batch] = deque()  # scheduled; the ranks have not come to them
        self.uncommitted: deque[tuple[tuple[int, ...], dict[int, TokenScore]]] = (
            deque()
        )  # run; the host has not seen the samples

    @property
    def in_flight(self) -> int:
        return len(self.unrun) + len(self.uncommitted)

    @precondition(lambda self: self.limits.max_context > 1)
    @rule(
        data=st.data(),
        max_tokens=st.integers(0, 12),
        scored=st.booleans(),
        priority=st.integers(-1, 1),
        n=st.integers(1, 3),
    )
    def arrive(self, data: st.DataObject, max_tokens: int, scored: bool, priority: int, n: int) -> None:
        max_tokens = max_tokens if scored else max(max_tokens, 1)
        length = data.draw(st.integers(1, self.limits.max_context - min(max_tokens, 1)))
        length = min(length, self.limits.tokens_per_group)
        prompt = tuple(data.draw(st.lists(st.integers(2, VOCAB - 1), min_size=length, max_size=length)))
        if self.requests:  # begin as an earlier one, with its answer, does
            earlier = data.draw(st.sampled_from(self.requests))
            shared = self.ranks.texts[earlier.id][: data.draw(st.integers(0, length))]
            prompt = (shared + prompt)[:length]
        client = data.draw(st.sampled_from(("a", "b", f"own {len(self.requests)}")))
        for _ in range(n):
            request = Request(
                id=len(self.requests),
                prompt=prompt,
                max_tokens=max_tokens,
                eos_ids=EOS,
                sampling=SamplingParams(prompt_logprobs=0) if scored else None,
                priority=priority,
                client=client,
            )
            self.scheduler.add(request)
            self.ranks.texts[request.id] = prompt + tuple(plain_loop(prompt, request.max_tokens)[0])
            self.requests.append(request)

    @precondition(lambda self: self.in_flight < 2)
    @rule()
    def schedule(self) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.in_flight or not self.scheduler.has_work, "work, but nothing to wait for"
            return
        self.look_at(batch)
        self.unrun.append(batch)

    def look_at(self, batch: Batch) -> None:
        chunks = [(index, chunk) for index, group in enumerate(batch.groups) for chunk in group]
        numbers = [chunk.request for _, chunk in chunks]
        assert 0 < batch.num_rows <= self.limits.rows_per_step
        size, preempted = self.limits.prefill_chunk, self.scheduler.stats().preemptions
        assert size or len(set(numbers)) == len(numbers), "a request twice in a step"
        for index, chunk in chunks:
            request, stop = self.requests[chunk.request], chunk.start + len(chunk.tokens)
            before = self.cached.get(chunk.request)
            assert request.group == index
            if chunk.start != before:  # found in the cache (more than it had, if its like went on), or run again
                assert before is None or preempted, "rows lost or doubled"
                assert chunk.start == request.num_found and chunk.start % self.limits.page_size == 0
                assert before is not None or chunk.start == request.num_cached_prompt
                assert self.limits.prefix_cache or chunk.start == 0
            assert stop < self.limits.max_context + (request.max_tokens == 0)
            if size and chunk.start >= len(request.prompt):
                assert len(chunk.tokens) == 1, "what was generated runs row by row"
            elif size:
                assert stop == min(chunk.start // size * size + size, len(request.prompt)), "a prompt cut elsewhere"
            assert len(chunk.pages) == num_pages_for(stop, self.limits.page_size) and 0 not in chunk.pages
            assert chunk.targets == request.prompt[stop - len(chunk.tokens) + 1 : stop + 1][
                -len(chunk.targets) :
            ] * bool(chunk.targets)
            self.cached[chunk.request] = stop

    @precondition(lambda self: self.unrun)
    @rule()
    def ranks_step(self) -> None:
        self.uncommitted.append(self.ranks.run(self.unrun.popleft()))

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        if not self.uncommitted:
            self.ranks_step()
        before = {request.id: len(request.output) for request in self.requests}
        ids, scores = self.uncommitted.popleft()
        touched = [request for request in self.scheduler.commit(ids, scores=scores) if request.max_tokens]
        grown = [request.id for request in self.requests if len(request.output) > before[request.id]]
        assert sorted(request.id for request in touched) == grown
        assert all(len(request.output) == before[request.id] + 1 for request in touched)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(data.draw(st.sampled_from(self.requests)))

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):  # a row for each, after any number of preemptions
            if not (self.scheduler.has_work or self.in_flight):
                break
            if self.in_flight < 2:
                self.schedule()
            if self.in_flight:
                self.commit()
            self.scheduler.check_integrity()
        assert not self.scheduler.has_work, "it never came to an end"
        assert all(pool.num_free == self.limits.pages_per_group - 1 for pool in self.scheduler.pools)
        for request in self.requests:
            output, reason = plain_loop(request.prompt, request.max_tokens)
            ends = range(2, len(request.prompt) + 1) if request.scores_prompt else ()
            expected = [score(request.prompt[:end]) for end in ends]
            if request.finish_reason == "abort":
                assert request.output == output[: len(request.output)]
                assert request.prompt_logprobs == expected[: len(request.prompt_logprobs)]
            else:
                assert (request.output, request.finish_reason) == (output, reason)
                assert request.prompt_logprobs == expected


TestServing = pytest.mark.slow(Serving.TestCase)
TestServing.settings = settings(max_examples=examples(120), stateful_step_count=60, deadline=None)


def crowd(rng: Random, clients: Sequence[str] = ()) -> tuple[int, int]:
    """Many requests with few different tokens, shared beginnings and few pages, run to the end; preemptions, and prompt
    tokens found in the cache. Each is a client of its own, or one of ``clients``."""
    page_size, num_pages, rows = rng.randint(1, 4), rng.randint(4, 14), rng.randint(1, 12)
    chunk = rng.choice((0, 0, rng.randint(0, min(4, rows))))
    limits = Limits(
        num_groups=rng.randint(1, 3),
        rows_per_step=rows,
        requests_per_group=rng.randint(2, 5),
        page_size=page_size,
        pages_per_group=num_pages,
        max_context=min(40, (num_pages - 1) * page_size + 1),
        prefill_chunk=chunk,
        scored_rows_per_step=max(rng.randint(0, 5), chunk),
        prefix_cache=rng.random() < 0.8,
        aging_steps=rng.randint(0, 4),
        decode_weight=rng.randint(0, 20),
        align_steps=rng.randint(0, 3),
    )
    scheduler, ranks = Scheduler(limits), Ranks(limits)
    requests: list[Request] = []
    in_flight: deque[tuple[tuple[int, ...], dict[int, TokenScore]]] = deque()
    for step in range(3000):
        if step < 40 and rng.random() < 0.5:
            scored = rng.random() < 0.2
            most = rng.randint(0 if scored else 1, 30)
            length = min(rng.randint(1, limits.max_context - 1), limits.tokens_per_group)
            prompt = tuple(rng.choices((2, 3), k=length))
            if requests:
                prompt = (ranks.texts[rng.choice(requests).id][: rng.randint(0, length)] + prompt)[:length]
            sampling = SamplingParams(prompt_logprobs=0) if scored else None
            number, priority = len(requests), rng.randint(-1, 1)
            most = min(most, limits.tokens_per_group + 1 - length)
            request = Request(
                id=number,
                prompt=prompt,
                max_tokens=most,
                eos_ids=frozenset({0}),
                sampling=sampling,
                priority=priority,
                client=rng.choice(clients or (f"own {number}",)),
            )
            scheduler.add(request)
            requests.append(request)
            ranks.texts[number] = prompt + tuple(plain_loop(prompt, request.max_tokens, request.eos_ids)[0])
        if requests and step < 40 and rng.random() < 0.05:
            scheduler.abort(rng.choice(requests))
        batch = scheduler.schedule() if len(in_flight) < 2 else None
        scheduler.check_integrity()
        if batch is not None:
            assert batch.num_rows <= limits.rows_per_step
            in_flight.append(ranks.run(batch))
        elif not in_flight:
            assert not scheduler.has_work, "work, but nothing to wait for"
            if step >= 40:
                break
        if in_flight and (batch is None or len(in_flight) == 2 or rng.random() < 0.5):
            ids, scores = in_flight.popleft()
            scheduler.commit(ids, scores=scores)
            scheduler.check_integrity()
    assert not scheduler.has_work, "it never came to an end"
    for request in requests:
        output, reason = plain_loop(request.prompt, request.max_tokens, request.eos_ids)
        ends = range(2, len(request.prompt) + 1) if request.scores_prompt else ()
        if request.finish_reason != "abort":
            assert (request.output, request.finish_reason) == (output, reason)
            assert request.prompt_logprobs == [score(request.prompt[:end]) for end in ends]
    stats = scheduler.stats()
    assert stats.kv_pages_used == 0
    return stats.preemptions, stats.cached_prompt_tokens


@pytest.mark.slow
@pytest.mark.parametrize("clients", [(), ("a", "a", "a", "b", "c")])
def test_a_crowd_in_a_small_cache(clients: Sequence[str]) -> None:
    seen = [crowd(Random(seed), clients) for seed in range(examples(150))]
    assert sum(preempted for preempted, _ in seen) > 30 and sum(found for _, found in seen) > 300
