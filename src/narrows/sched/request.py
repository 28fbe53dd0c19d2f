"""A request: one prompt on its way to text, with its counters.

The tokens of a request are its prompt, then the sampled ones. The row of a token runs once before the next token can be
sampled, and again if its KV was given up meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from narrows.sched.guide import Guide
from narrows.sched.pages import num_pages_for, page_hash
from narrows.sched.sampling import Logprobs, SamplingParams, TokenScore

__all__ = ["Request"]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """``finish_reason`` is empty until it is ``stop``, ``length``, or what it was aborted with.

    ``priority``: lower runs earlier, equal ones first come, first served. ``guide``: what may be generated.
    ``client``: the client that it runs for; clients share running slots, pages and rows (:mod:`narrows.sched.shares`).
    ``cache_salt``: only requests of one salt find each other's pages; not 16 bytes long, as hashes are.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    sampling: SamplingParams | None = None
    priority: int = 0
    guide: Guide | None = None
    client: str = ""
    cache_salt: bytes = b""
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """One per token of ``output``, if ``sampling`` requests them."""
    prompt_logprobs: list[TokenScore] = field(default_factory=list)
    """One per token of ``prompt`` from the second on, if ``sampling`` requests them."""
    finish_reason: str = ""
    num_cached_prompt: int = 0
    """Tokens of the prompt that were found in the prefix cache when it first ran."""

    # The rest is the scheduler's.
    arrival: int = -1
    """How many requests were added before it."""
    turn: tuple[int, int] = (0, 0)
    """Requests are served by rising turn: when it came, priority counted in, then arrival."""
    since: tuple[int, int] = (0, 0)
    """Its turn beside the running requests of other clients: its own, or later if its client had rows meanwhile."""
    rank: int = 0
    """How many running requests of its client go before it."""
    group: int = -1
    """Its attention group while it runs; -1 while it waits."""
    holds: int = -1
    """The group that admits no later request until this one runs; -1: none."""
    pages: list[int] = field(default_factory=list)
    num_found: int = 0
    """Tokens whose KV was found in the cache when it was admitted last."""
    num_cached: int = 0
    """Tokens whose KV is in ``pages`` once the steps in flight have run: found there, or rows scheduled."""
    num_registered: int = 0
    """Its first pages that were found, or have been offered to be found by others."""
    num_fed: int = 0
    """Tokens whose rows have ever been scheduled or skipped, preempted ones included."""
    num_sampled: int = 0
    """Samples that have been scheduled; those not yet in ``output`` are still on the ranks."""
    num_scored: int = 0
    """Rows of the prompt whose scores have been scheduled."""
    mask_late: bool = False
    """Whether its guide was seen still making the mask of the next token."""
    last_slot: int = -1
    """Slot of its newest sample among the samples of its step."""
    hashes: list[bytes] = field(default_factory=list)
    """Of its first full pages, as far as they were needed."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it has, known to the host or not."""
        return len(self.prompt) + self.num_sampled

    @property
    def num_known(self) -> int:
        """Tokens that the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens that enter the cache if it becomes as long as it may: all but the last sample."""
        return len(self.prompt) + self.most_samples - 1

    @property
    def most_samples(self) -> int:
        """Samples it may take; a prompt that is only scored takes one, which is dropped."""
        return max(self.max_tokens, 1)

    @property
    def rows_left(self) -> int:
        """Rows to run before its next sample; 0: the step that takes it is in flight and not over."""
        return self.num_tokens - self.num_cached

    @property
    def prefilled(self) -> bool:
        """Whether only its newest sample is left to run."""
        return self.num_sampled > 0 and self.rows_left <= 1

    @property
    def wants_rows(self) -> bool:
        """Whether rows may be scheduled: it needs more samples, and their inputs are known."""
        return not self.is_through and (self.guide is None or not (self.awaits_sample or self.mask_late))

    @property
    def is_through(self) -> bool:
        """Whether all its samples have been scheduled."""
        return self.num_sampled >= self.most_samples

    @property
    def awaits_sample(self) -> bool:
        """Whether a sample of it is still on the ranks."""
        return self.num_sampled > len(self.output)

    @property
    def scores_prompt(self) -> bool:
        """Whether every token of the prompt is to be scored; then it need not generate any (``max_tokens`` 0)."""
        return self.sampling is not None and self.sampling.prompt_logprobs is not None

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Its known tokens from position ``start`` to before ``stop``."""
        behind = len(self.prompt)
        return self.prompt[start:stop] + tuple(self.output[max(start - behind, 0) : max(stop - behind, 0)])

    def may_grow(self, num_pages: int, page_size: int) -> bool:
        """Whether its longest text needs more than so many pages."""
        return num_pages_for(self.most_tokens, page_size) > num_pages

    def hashes_of(self, num_pages: int, page_size: int) -> list[bytes]:
        """The hashes of its first pages, which are full and known."""
        for page in range(len(self.hashes), num_pages):
            parent = self.hashes[-1] if self.hashes else self.cache_salt
            self.hashes.append(page_hash(parent, self.tokens(page * page_size, (page + 1) * page_size)))
        return self.hashes[:num_pages]
