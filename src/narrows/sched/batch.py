"""A batch: the work of one step as plain numbers, which rows of which requests in which group, and where their KV is.

Ranks only execute a batch, so none can disagree with another. Rows are ordered by group, then by chunk, then by
position. A token is an id, or a reference to a sample of the previous step, which stays on the ranks: so the next step
can be scheduled before the host knows the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from narrows.sched.sampling import SamplingParams

__all__ = ["Batch", "Chunk", "sample_ref", "sample_slot"]


def sample_ref(slot: int) -> int:
    """The token that stands for sample ``slot`` of the previous step: a negative number, since ids are not."""
    return -1 - slot


def sample_slot(token: int) -> int:
    """Which sample a reference stands for; the inverse of :func:`sample_ref`."""
    return -1 - token


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive rows of one request.

    ``start`` is the position of its first row, that is, how many tokens of the request are in the cache already.
    ``pages`` hold the cache of the request up to and including these rows. The last ``num_logits`` rows have logits.
    The first of those are scored: of ``targets``, the tokens that follow them in the prompt, the probability is
    computed. If one is left over, it is sampled, as ``sampling`` says (None: greedy). ``num_prompt`` is the number of
    tokens of the request's prompt: rows from there on are its own output. 0: the prompt ends with these rows.

    ``skipped``: of a request that penalises, the tokens right before ``start`` that no batch has had as rows, since
    their KV was found in the cache. ``allowed``: the mask of what may be sampled (see :meth:`Guide.allowed`); empty:
    anything. ``banned``: ids that may not be sampled.
    """

    request: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    num_logits: int = 0
    sampling: SamplingParams | None = None
    num_prompt: int = 0
    targets: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    allowed: bytes = b""
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.tokens and 0 <= self.num_logits <= len(self.tokens), "a chunk has rows, and logits of some of them"
        assert len(self.targets) <= self.num_logits, "a row that is scored has logits"

    def __reduce__(self) -> tuple[Any, ...]:
        """A chunk as it is sent to ranks, once per step, without fields at their defaults."""
        usual = (self.request, self.start, self.tokens, self.pages, self.num_logits, self.sampling, self.num_prompt)
        if not (self.targets or self.skipped or self.allowed or self.banned):
            return _chunk, usual
        return _chunk, (*usual, self.targets, self.skipped, self.allowed, self.banned)

    def lengths(self) -> list[int]:
        """For each row, the tokens of the sequence that it belongs to: the prompt's, or those up to its own output."""
        stop = self.start + len(self.tokens)
        return [max(self.num_prompt or stop, position + 1) for position in range(self.start, stop)]

    @property
    def is_sampled(self) -> bool:
        """Whether its last row chooses a token."""
        return self.num_logits > len(self.targets)

    @property
    def needs_logits(self) -> bool:
        """Whether its rows need whole rows of logits, not only the best token."""
        if not self.num_logits:
            return False
        return bool(self.allowed or self.banned) or (self.sampling is not None and self.sampling.needs_logits)


def _chunk(*values: Any) -> Chunk:
    return Chunk(**dict(zip(Chunk.__slots__, values, strict=False)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step of all attention groups; a group without chunks is ordinary.

    ``ended`` are requests that will not return: ranks drop their state.
    """

    groups: tuple[tuple[Chunk, ...], ...]
    ended: tuple[int, ...] = ()

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of each attention group."""
        return tuple(sum(len(chunk.tokens) for chunk in group) for group in self.groups)

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)

    @property
    def num_logit_rows(self) -> int:
        return sum(chunk.num_logits for group in self.groups for chunk in group)

    @property
    def phase(self) -> str:
        """``decode`` when every chunk continues a request by one row, else ``prefill`` (mixed steps too)."""
        chunks = [chunk for group in self.groups for chunk in group]
        return "decode" if all(len(c.tokens) == 1 and c.start > 0 for c in chunks) else "prefill"

    @property
    def needs_logits(self) -> bool:
        """Whether any row needs whole rows of logits, not only the best token."""
        return any(chunk.needs_logits for group in self.groups for chunk in group)

    def logit_rows(self) -> tuple[int, ...]:
        """Which rows of the step ask for logits, ascending."""
        rows: list[int] = []
        at = 0
        for group in self.groups:
            for chunk in group:
                at += len(chunk.tokens)
                rows.extend(range(at - chunk.num_logits, at))
        return tuple(rows)

    def samples(self) -> tuple[tuple[int, int], ...]:
        """(request, its slot among the step's logit rows) for every chunk that is sampled, in row order."""
        out: list[tuple[int, int]] = []
        slot = 0
        for group in self.groups:
            for chunk in group:
                slot += chunk.num_logits
                if chunk.is_sampled:
                    out.append((chunk.request, slot - 1))
        return tuple(out)

    def scored(self) -> tuple[tuple[int, range], ...]:
        """(request, the slots of its scored rows among the step's logit rows) for every chunk that has any, in order.

        The i-th slot is of the i-th of the chunk's ``targets``.
        """
        out: list[tuple[int, range]] = []
        slot = 0
        for group in self.groups:
            for chunk in group:
                if chunk.targets:
                    out.append((chunk.request, range(slot, slot + len(chunk.targets))))
                slot += chunk.num_logits
        return tuple(out)
