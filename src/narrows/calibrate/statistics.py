"""Medians, spreads, and ratios of what was measured in turns.

A machine that others use too is slow for a while and fast again, so variants take turns within rounds, and a ratio is
taken within each round before its median: what slows a whole round cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "median_interval", "quantile", "ratios", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle of some values, and the tenth and ninetieth percentiles around it."""

    median: float
    p10: float
    p90: float
    count: int


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie, on the line between its two neighbours.

    >>> quantile([4.0, 1.0, 2.0], 0.5), quantile([1.0, 2.0], 0.1)
    (2.0, 1.1)
    """
    assert values and 0 <= share <= 1
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    return below + (above - below) * (at - math.floor(at))


def spread(values: Sequence[float]) -> Spread:
    """The :class:`Spread` of at least one value."""
    return Spread(median=quantile(values, 0.5), p10=quantile(values, 0.1), p90=quantile(values, 0.9), count=len(values))


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """What ``values`` are in terms of ``base``, round by round.

    >>> ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]).median
    2.0
    """
    return spread([value / one for value, one in zip(values, base, strict=True)])


def median_interval(values: Sequence[float], confidence: float = 0.9) -> tuple[float, float]:
    """Where the median of what ``values`` are drawn from lies, with so much confidence, whatever its distribution.

    Two of the values, equally far from the ends: fewer than k of n draws lie below the true median with the chance that
    fewer than k of n coins show heads. Too few values for that confidence give the lowest and the highest.

    >>> median_interval([5.0, 1.0, 4.0, 2.0, 3.0]), median_interval([float(i) for i in range(21)])
    ((1.0, 5.0), (6.0, 14.0))
    """
    ordered, n = sorted(values), len(values)
    outside, at = 0.0, 0
    while at < (n - 1) // 2:
        outside += 2 * math.comb(n, at) / 2**n
        if 1 - outside - 2 * math.comb(n, at + 1) / 2**n < confidence:
            break
        at += 1
    return ordered[at], ordered[n - 1 - at]
