"""A fixed sequence of steps with every kind of batch, which `verify` runs on one rank and on many.

Prompt i belongs to group i modulo the groups. The first step prefills half of every prompt; the next the rest of the
even ones, so that groups differ; then the even ones decode while the odd ones finish their prompts; then all decode,
and every third step only the first group has rows. Every row asks for logits, or with ``few_logits`` in the third step
only the last of each sequence, as of any prompt that is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from narrows.errors import ConfigError
from narrows.sched.batch import Batch, Chunk
from narrows.sched.pages import num_pages_for

__all__ = ["VerifyBatches"]


@dataclass(slots=True)
class _Sequence:
    index: int
    tokens: list[int]
    prompt_length: int
    group: int
    pages: tuple[int, ...]
    num_cached: int = 0


def _decode(sequence: _Sequence, *, only_first_group: bool) -> int:
    return 0 if only_first_group and sequence.group else 1


class VerifyBatches:
    """Iterate for batches; after each, :meth:`sampled` must deliver its samples before the next batch."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_groups: int,
        num_steps: int,
        page_size: int,
        few_logits: bool = False,
    ) -> None:
        if not prompts or any(not prompt for prompt in prompts):
            raise ConfigError("verify needs at least one prompt, each of at least one token")
        self.num_groups, self.num_steps, self._few_logits = max(num_groups, 1), num_steps, few_logits
        self.max_context = max(2, max(len(prompt) for prompt in prompts) + num_steps + 1)
        self.pages_each = num_pages_for(self.max_context, page_size)
        per_group = -(-len(prompts) // self.num_groups)
        self.kv_tokens = per_group * self.pages_each * page_size
        self._sequences = [
            _Sequence(
                index=i,
                tokens=list(prompt),
                group=i % self.num_groups,
                pages=self._pages(i // self.num_groups),
                prompt_length=len(prompt),
            )
            for i, prompt in enumerate(prompts)
        ]

    def _pages(self, index: int) -> tuple[int, ...]:
        first = 1 + index * self.pages_each
        return tuple(range(first, first + self.pages_each))

    def __iter__(self) -> Iterator[Batch]:
        yield from self._step(lambda s: (s.prompt_length + 1) // 2)
        yield from self._step(lambda s: s.prompt_length - s.num_cached if s.index % 2 == 0 else 0)
        yield from self._step(lambda s: 1 if s.index % 2 == 0 else s.prompt_length - s.num_cached, few=self._few_logits)
        for step in range(self.num_steps - 1):
            only_first_group = step % 3 == 2
            yield from self._step(partial(_decode, only_first_group=only_first_group))

    def _step(self, num_rows: Callable[[_Sequence], int], *, few: bool = False) -> Iterator[Batch]:
        groups: list[list[Chunk]] = [[] for _ in range(self.num_groups)]
        for sequence in self._sequences:
            rows = min(num_rows(sequence), len(sequence.tokens) - sequence.num_cached)
            if rows > 0:
                start = sequence.num_cached
                sequence.num_cached += rows
                groups[sequence.group].append(
                    Chunk(
                        request=sequence.index,
                        start=start,
                        tokens=tuple(sequence.tokens[start : start + rows]),
                        pages=sequence.pages,
                        num_logits=1 if few else rows,
                        num_prompt=sequence.prompt_length,
                    )
                )
        batch = Batch(groups=tuple(tuple(group) for group in groups))
        if batch.num_rows:
            yield batch

    def sampled(self, batch: Batch, ids: tuple[int, ...]) -> None:
        """Take in the samples of ``batch``: a sequence all of whose tokens have been run grows by its sample."""
        for index, slot in batch.samples():
            sequence = self._sequences[index]
            if sequence.num_cached == len(sequence.tokens):
                sequence.tokens.append(ids[slot])

    def merged(self, batch: Batch) -> Batch:
        """The same rows in the same order as one group, whose cache holds the pages of all groups side by side."""
        per_group = self.kv_pages
        chunks = [
            Chunk(
                request=chunk.request,
                start=chunk.start,
                tokens=chunk.tokens,
                pages=tuple(page + group * per_group for page in chunk.pages),
                num_logits=chunk.num_logits,
                num_prompt=chunk.num_prompt,
            )
            for group, chunks in enumerate(batch.groups)
            for chunk in chunks
        ]
        return Batch(groups=(tuple(chunks),))

    @property
    def kv_pages(self) -> int:
        """Pages that one group's sequences use, the null page not counted."""
        return self.pages_each * -(-len(self._sequences) // self.num_groups)
