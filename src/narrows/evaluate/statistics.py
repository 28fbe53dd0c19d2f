"""When a difference is more than chance: standard errors, paired tests, and the one threshold they share.

Everything is paired: a layout answers the same items as one rank, so items that both get right or wrong do not count,
and a difference far smaller than the standard error of either accuracy shows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["SIGMAS", "Mean", "binomial_error", "clustered_mean", "paired_p_value", "significance"]

SIGMAS = 4.0
"""Standard errors after which a difference counts. By chance alone one of 16,000 normal numbers is further off, on
either side, so a table of 100 cells raises a false alarm once in 160 runs."""


def significance() -> float:
    """The two-sided p-value of SIGMAS standard errors: 6.3e-5."""
    return math.erfc(SIGMAS / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Mean:
    """An average and its standard error; the error is infinite where it cannot be known (fewer than 5 clusters)."""

    value: float
    error: float
    num_clusters: int


def binomial_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` items: ``sqrt(p (1 - p) / n)``.

    >>> round(binomial_error(0.9, 100), 3)
    0.03
    """
    return math.sqrt(share * (1 - share) / count) if count else math.nan


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Mean:
    """The mean of values that are not independent within a cluster (the tokens of one text), with its standard error.

    ``error^2 = C / (C - 1) * sum over clusters of (sum of (x - mean))^2 / n^2`` for C clusters (the sandwich estimator;
    with clusters of one value each it is the usual ``s^2 / n``).
    """
    count = len(values)
    if not count:
        return Mean(0.0, math.inf, 0)
    mean = math.fsum(values) / count
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + (value - mean)
    num = len(sums)
    if num < 5:
        return Mean(mean, math.inf, num)
    return Mean(mean, math.sqrt(num / (num - 1) * math.fsum(s * s for s in sums.values())) / count, num)


def paired_p_value(gained: int, lost: int) -> float:
    """McNemar's exact test: how likely ``gained`` against ``lost`` items, or further apart, if both were as likely.

    >>> paired_p_value(3, 3), paired_p_value(0, 0), round(paired_p_value(0, 5), 4)
    (1.0, 1.0, 0.0625)
    """
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << count)))
