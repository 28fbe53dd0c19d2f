"""Fixed steps over known texts, so that two engines see the same rows: prefill in chunks, mixed steps, decode.

Texts come in waves that fit a step and the cache, or one at a time: an error that needs one row on many ranks is then
not averaged away. Every row has logits, and decode is fed the text's own next token, so no engine can lead
another astray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from narrows.evaluate.verify_batches import VerifyBatches
from narrows.sched.batch import Batch
from narrows.sched.pages import num_pages_for
from narrows.sched.scheduler import Limits

__all__ = ["NUM_DECODE", "TEXT_TOKENS", "ForcedStep", "forced_steps", "pick_texts"]

TEXT_TOKENS = 32
"""Tokens of a text that are used: two pages of 16, or the whole context if it is shorter."""

NUM_DECODE = 8
"""Tokens of a text, its last, that are run one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedStep:
    """One batch; the same rows as one group, for one rank; and which text each row is of."""

    batch: Batch
    merged: Batch
    text_of_row: tuple[int, ...]


def pick_texts(tasks: Sequence[Sequence[tuple[int, ...]]], num_rows: int, max_context: int) -> list[tuple[int, ...]]:
    """Texts of all tasks in turn, the first TEXT_TOKENS of each, until they have ``num_rows`` rows."""
    most = min(TEXT_TOKENS, max_context)
    texts: list[tuple[int, ...]] = []
    rows = 0
    longest = max((len(task) for task in tasks), default=0)
    for i in range(longest):
        for task in tasks:
            if i < len(task) and len(text := task[i][:most]) > 1 and rows + len(text) <= num_rows:
                texts.append(text)
                rows += len(text)
    return texts


def forced_steps(
    texts: Sequence[tuple[int, ...]], limits: Limits, *, alone: bool, first_text: int = 0
) -> Iterator[ForcedStep]:
    """The steps of all texts, in waves, or one at a time, the groups taking turns.

    ``limits`` are of the engine that is judged; ``first_text`` numbers the first text.
    """
    at = 0
    while at < len(texts):
        wave = texts[at : at + (1 if alone else _wave(limits))]
        prompts = [text[: max(1, len(text) - NUM_DECODE)] for text in wave]
        fixed = VerifyBatches(prompts, num_groups=limits.num_groups, num_steps=NUM_DECODE, page_size=limits.page_size)
        turn = at % limits.num_groups if alone else 0
        for batch in fixed:
            forced, text_of_row = _next_tokens(batch, wave, first_text + at)
            fixed.sampled(batch, forced)
            merged = fixed.merged(batch)
            groups = batch.groups[-turn:] + batch.groups[:-turn] if turn else batch.groups
            yield ForcedStep(batch=Batch(groups=groups), merged=merged, text_of_row=text_of_row)
        at += len(wave)


def _wave(limits: Limits) -> int:
    """Texts at a time: half their rows are one step, which must not hold too many logits, and all are cached."""
    rows = min(limits.rows_per_step, limits.scored_rows_per_step or limits.rows_per_step)
    pages = num_pages_for(TEXT_TOKENS + 1, limits.page_size)
    cached = max(1, (limits.pages_per_group - 1) // pages) * limits.num_groups
    return max(1, min(16, 2 * rows // TEXT_TOKENS, cached))


def _next_tokens(batch: Batch, wave: Sequence[tuple[int, ...]], first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What follows each row in its text, and which text it is of; a row at its text's end is followed by its first."""
    following, text_of_row = [], []
    for group in batch.groups:
        for chunk in group:
            text = wave[chunk.request]
            for i in range(len(chunk.tokens)):
                following.append(text[(chunk.start + i + 1) % len(text)])
                text_of_row.append(first + chunk.request)
    return tuple(following), tuple(text_of_row)
