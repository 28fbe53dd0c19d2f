"""The steps that a server will probably run, the likeliest first, so that it can prepare for them."""

from __future__ import annotations

from collections.abc import Iterator

from narrows.layout import split_evenly
from narrows.plan.cache import PlanKey, bucket

__all__ = ["expected_decodes", "expected_keys"]


def expected_keys(num_groups: int, *, most_decoding: int, rows_per_step: int) -> Iterator[PlanKey]:
    """Every bucket of a step whose rows are spread evenly over the groups, or all in one of them.

    Decode steps of 1 to ``most_decoding`` rows come first, few rows before many; then prefill steps of 1 to
    ``rows_per_step`` rows, first those in which one prompt or none ends, then those with more rows that ask for logits.

    >>> [(key.phase, key.rows, key.logit_rows) for key in expected_keys(1, most_decoding=3, rows_per_step=2)]
    [('decode', 1, 1), ('decode', 2, 2), ('decode', 3, 3), ('prefill', 1, 1), ('prefill', 2, 1), ('prefill', 1, 0), \
('prefill', 2, 0), ('prefill', 2, 2)]
    """
    seen: set[PlanKey] = set()
    for key in _every(num_groups, most_decoding, rows_per_step):
        if key not in seen:
            seen.add(key)
            yield key


def expected_decodes(num_groups: int, *, most: int) -> Iterator[tuple[int, ...]]:
    """The rows of each group in every decode step of 1 to ``most`` rows that are spread evenly.

    >>> list(expected_decodes(2, most=3))
    [(1, 0), (1, 1), (2, 1)]
    """
    for rows in range(1, most + 1):
        yield split_evenly(rows, num_groups)


def _every(num_groups: int, most_decoding: int, rows_per_step: int) -> Iterator[PlanKey]:
    for least, most in _buckets(most_decoding):
        for groups in _spread(least, most, num_groups):
            yield PlanKey.of("decode", groups, most)
    for logit_rows in (1, 0, *(most for _, most in _buckets(rows_per_step))):
        for least, most in _buckets(rows_per_step):
            if most >= logit_rows:
                for groups in _spread(least, most, num_groups):
                    yield PlanKey.of("prefill", groups, logit_rows)


def _buckets(most: int) -> Iterator[tuple[int, int]]:
    """The fewest and the most rows of every bucket that holds 1 to ``most``."""
    rows = 1
    while rows <= most:
        yield rows, bucket(rows)
        rows = bucket(rows) + 1


def _spread(least: int, most: int, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Rows of the groups; how many the largest has, decides the bucket too."""
    return (split_evenly(most, num_groups), split_evenly(least, num_groups), (most, *(0,) * (num_groups - 1)))
