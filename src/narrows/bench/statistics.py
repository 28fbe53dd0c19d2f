"""Medians, spreads, and ratios of what was measured in turns. PURE.

Knows numbers only. A machine that others use too is slow for a while and fast again, so variants take turns within
rounds, and a ratio is taken within each round before its median: what slows a whole round cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "quantile", "ratios", "spread"]


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
