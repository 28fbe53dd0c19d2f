"""Decode steps padded with dead rows to the next bucket, so that steps of many sizes are the same step to a device."""

from __future__ import annotations

from dataclasses import dataclass

from narrows.plan.cache import bucket
from narrows.sched.batch import Batch, Chunk

__all__ = ["Padded", "padded"]

_DEAD = Chunk(request=-1, start=0, tokens=(0,), pages=(0,), num_logits=1)
"""Token 0 at the first position of the null page. No expert sees it (`Program.frame`), and nobody reads its sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """A batch with dead rows behind each group's own; ``live``: the rows that are requests'."""

    batch: Batch
    live: tuple[int, ...]

    def is_dead(self) -> list[bool]:
        """Of each row of the batch."""
        live = set(self.live)
        return [row not in live for row in range(self.batch.num_rows)]


def padded(batch: Batch) -> Padded:
    """A decode step whose rows all ask for logits, each group of as many rows as its bucket has.

    >>> row = Chunk(request=7, start=3, tokens=(5,), pages=(1,), num_logits=1)
    >>> made = padded(Batch(groups=((row,) * 5, (), (row,))))
    >>> made.batch.group_rows, made.live
    ((6, 0, 1), (0, 1, 2, 3, 4, 6))
    """
    assert batch.num_logit_rows == batch.num_rows, "a dead row has logits, so every row has"
    groups: list[tuple[Chunk, ...]] = []
    live: list[int] = []
    at = 0
    for group in batch.groups:
        num_rows = bucket(len(group))
        groups.append((*group, *(_DEAD,) * (num_rows - len(group))))
        live += range(at, at + len(group))
        at += num_rows
    return Padded(batch=Batch(groups=tuple(groups), ended=batch.ended), live=tuple(live))
