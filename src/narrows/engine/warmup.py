"""Warm-up: decode steps of dummy rows, run while an engine is idle, so that real steps of their size find a capture."""

from __future__ import annotations

from collections.abc import Iterator

from narrows.plan.expected import expected_decodes
from narrows.sched.batch import Batch, Chunk
from narrows.sched.limits import Limits
from narrows.sched.pages import num_pages_for
from narrows.sched.sampling import SamplingParams

__all__ = ["WarmUp", "warmup_batch"]

_GREEDY, _DRAWN = (False,), (False, True)


class WarmUp:
    """The decode steps of a warm-up, each once, few rows before many.

    Args:
        most_rows: rows of the largest step.
        drawn: also steps whose tokens are sampled, not only greedy ones.
    """

    def __init__(self, limits: Limits, most_rows: int, *, drawn: bool) -> None:
        self._limits = limits
        self._most = min(limits.most_decoding, most_rows)
        self._ways = _DRAWN if drawn else _GREEDY
        self.begin_again()

    def next(self) -> Batch | None:
        """The next step; None: none is left."""
        return next(self._left, None)

    def begin_again(self) -> None:
        """Start over: the ranks have bound their plans again and lost their captures."""
        self._left = self._all()

    def end(self) -> None:
        """Skip the steps that are left."""
        self._left = iter(())

    def _all(self) -> Iterator[Batch]:
        for group_rows in expected_decodes(self._limits.num_groups, most=self._most):
            for drawn in self._ways:
                yield warmup_batch(group_rows, self._limits.page_size, drawn=drawn)


def warmup_batch(group_rows: tuple[int, ...], page_size: int, *, drawn: bool) -> Batch:
    """A decode step of so many dummy rows per group: token 0 at position 1 of the null page; ``drawn``: not greedy.

    >>> warmup_batch((2, 1), 16, drawn=False).phase, warmup_batch((2, 1), 16, drawn=True).needs_logits
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
