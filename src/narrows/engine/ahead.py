"""What is made before a step asks for it: plans, and decode steps whose tapes will be there when the first one comes.

Knows limits, buckets and batches of nobody's rows; not how plans are made, nor when there is time for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from narrows.plan.book import BookKey
from narrows.plan.expected import expected_decodes, expected_keys
from narrows.sched.batch import Batch, Chunk
from narrows.sched.limits import Limits
from narrows.sched.pages import num_pages_for
from narrows.sched.sampling import SamplingParams

__all__ = ["Ahead", "rehearsal"]

_MOST_PLANS = 128
"""Buckets whose plans are made before a step asks for them, 20 KB each in every process."""
_GREEDY, _DRAWN = (False,), (False, True)


class Ahead:
    """The buckets and the decode steps that come next, each once, likely ones first.

    Args:
        rehearse_rows: rows of the largest decode step to rehearse.
        one_plan: one plan runs at every step, so none is to be made; it is rehearsed for greedy rows.
    """

    def __init__(self, limits: Limits, rehearse_rows: int, *, one_plan: bool) -> None:
        self._limits, self._rehearse_rows, self._one_plan = limits, rehearse_rows, one_plan
        self._most = min(limits.requests_per_group * limits.num_groups, limits.rows_per_step)
        self._buckets = self._expected_buckets()
        self.begin_again()

    def bucket(self) -> tuple[BookKey, bool] | None:
        """The next bucket to plan, and whether for steps that need whole rows of logits."""
        return next(self._buckets, None)

    def decode(self) -> Batch | None:
        """The next decode step to rehearse."""
        return next(self._decodes, None)

    def begin_again(self) -> None:
        """What the ranks had of rehearsals is gone: they bind their plans anew."""
        self._decodes = self._expected_decodes()

    def end_decodes(self) -> None:
        """Rehearse nothing more."""
        self._decodes = iter(())

    def _expected_buckets(self) -> Iterator[tuple[BookKey, bool]]:
        if self._one_plan:
            return
        limits = self._limits
        keys = expected_keys(limits.num_groups, most_decoding=self._most, rows_per_step=limits.rows_per_step)
        for key in itertools.islice(keys, _MOST_PLANS):
            yield key, False
            yield key, True  # somebody draws, or asks for log-probabilities

    def _expected_decodes(self) -> Iterator[Batch]:
        limits = self._limits
        for group_rows in expected_decodes(limits.num_groups, most=min(self._most, self._rehearse_rows)):
            for drawn in _GREEDY if self._one_plan else _DRAWN:
                yield rehearsal(group_rows, limits.page_size, drawn=drawn)


def rehearsal(group_rows: tuple[int, ...], page_size: int, *, drawn: bool) -> Batch:
    """A decode step of so many rows per group, all of token 0 at position 1 of the null page; ``drawn``: not greedily.

    >>> rehearsal((2, 1), 16, drawn=False).phase, rehearsal((2, 1), 16, drawn=True).needs_logits
    ('decode', True)
    """
    row = Chunk(
        request=-1,
        start=1,
        tokens=(0,),
        pages=(0,) * num_pages_for(2, page_size),
        num_logits=1,
        sampling=SamplingParams(temperature=1.0, seed=0) if drawn else None,
    )
    return Batch(groups=tuple((row,) * rows for rows in group_rows))
