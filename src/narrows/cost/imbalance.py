"""The load of the fullest rank over the even share, where ranks hold whole experts: a function of ranks and rows.

Two causes. Experts are not equally popular: their loads are drawn from a power law, density ``x ** -skew`` between 1
and 0.8 x 4096, which is what NVIDIA AIConfigurator draws synthetic DeepSeek loads from (exponent 1.01; 0.6 stands for
balanced experts). And few rows fall unevenly even on equal experts, as balls do into bins. A step waits for its fullest
rank, and a model's layers each draw again, so what counts is the mean of the largest load over many draws.

The draws are seeded and the same everywhere. Up to 32 rows each row's experts are drawn one by one, without putting
back; beyond, a rank's load is its experts' popularity and a Gaussian of the variance that so many rows leave. Their
number is bounded whatever the model: rows of more than 32 experts are drawn one by one up to fewer rows, and more than
1024 experts fewer times.
"""

from __future__ import annotations

import math
from bisect import bisect
from functools import lru_cache
from itertools import accumulate
from random import Random

from narrows.layout import Span, split_evenly, starts

__all__ = ["DEFAULT_SKEW", "LARGEST_SKEW", "imbalance", "largest_loads"]

DEFAULT_SKEW = 1.01
"""The exponent for a model whose experts are not rearranged."""
LARGEST_SKEW = 4.0

_RANGE = 0.8 * 4096
_TRIALS = 128
_POPULARITIES = _TRIALS * 1024
"""Drawn in all trials together; of more experts there are fewer trials."""
_EXACT = 5
"""Rows up to 2 ** this are drawn one by one..."""
_PAIRS = 32 << _EXACT
"""... and, of several, those with no more (row, expert) pairs than these."""
_LAST = 16
"""Beyond 2 ** this rows chance adds nothing."""


def imbalance(ranks: int, rows: float, *, experts: int, top_k: int, skew: float = DEFAULT_SKEW) -> float:
    """The fullest rank's (row, expert) pairs over those it would have if all experts were chosen alike, expected.

    ``experts`` in all are held whole by ``ranks``, each row goes to ``top_k`` of them; ``skew`` 0: all alike.
    Rises with ranks and skew, falls with rows; between powers of 2 of rows it is a straight line in their logarithm.

    >>> imbalance(1, 8, experts=256, top_k=8)
    1.0
    """
    if ranks == 1 or rows <= 0:
        return 1.0
    means = _means(ranks, experts, top_k, skew)
    at = min(max(math.log2(rows), 0.0), float(_LAST))
    below = int(at)
    above = min(below + 1, _LAST)
    return means[below] + (means[above] - means[below]) * (at - below)


@lru_cache(maxsize=256)
def _means(ranks: int, experts: int, top_k: int, skew: float) -> tuple[float, ...]:
    """At 1, 2, 4, ... rows; more rows never spread worse than fewer."""
    means = (max(1.0, sum(loads) / len(loads)) for loads in largest_loads(ranks, experts, top_k, skew))
    return tuple(accumulate(means, min))


def largest_loads(ranks: int, experts: int, top_k: int, skew: float) -> tuple[tuple[float, ...], ...]:
    """The fullest rank's load over its even share in each of the draws, at 1, 2, 4, ... 65536 rows."""
    spans = starts(split_evenly(experts, ranks))
    even = top_k * (spans[0][1] - spans[0][0]) / experts
    trials = min(_TRIALS, max(_POPULARITIES // experts, 1))
    draws = [_draw(Random(trial), spans, experts, top_k, skew) for trial in range(trials)]
    by_rows = zip(*draws, strict=True)
    return tuple(tuple(pairs / ((1 << power) * even) for pairs in found) for power, found in enumerate(by_rows))


def _draw(random: Random, spans: tuple[Span, ...], experts: int, top_k: int, skew: float) -> list[float]:
    """Pairs of the fullest rank at 1, 2, 4, ... rows, for experts of one popularity."""
    chosen = _chosen(random, experts, top_k, skew)
    found: list[float] = []
    owner = [rank for rank, (lo, hi) in enumerate(spans) for _ in range(lo, hi)]
    cumulated, counts = list(accumulate(chosen)), [0] * len(spans)
    exact = max(0, min(_EXACT, (_PAIRS // top_k).bit_length() - 1))
    for row in range(1, (1 << exact) + 1):
        for expert in _distinct(random, cumulated, chosen, top_k):
            counts[owner[expert]] += 1
        if row & (row - 1) == 0:
            found.append(max(counts))
    rates = [sum(chosen[lo:hi]) for lo, hi in spans]
    left = (experts - top_k) / max(experts - 1, 1)
    spreads = [math.sqrt(max(rate * (1 - rate / top_k) * left, 0.0)) * random.gauss(0, 1) for rate in rates]
    for power in range(exact + 1, _LAST + 1):
        rows = 1 << power
        found.append(max(rows * rate + math.sqrt(rows) * spread for rate, spread in zip(rates, spreads, strict=True)))
    return found


def _chosen(random: Random, experts: int, top_k: int, skew: float) -> list[float]:
    """How often a row chooses each expert: popularity, cut at once per row, adding up to ``top_k``."""
    if top_k == experts:
        return [1.0] * experts
    powers = _popularities(random, experts, skew)
    total = sum(powers)
    chosen = [top_k * power / total for power in powers]
    while (most := max(chosen)) > 1 + 1e-9:
        whole = sum(each >= 1 for each in chosen)
        rest = sum(each for each in chosen if each < 1)
        if rest <= 0 or whole >= top_k:
            break
        chosen = [1.0 if each >= 1 else each * (top_k - whole) / rest for each in chosen]
        if max(chosen) >= most:
            break
    return chosen


def _popularities(random: Random, experts: int, skew: float) -> list[float]:
    """Drawn from the power law, by the share of it that lies below each."""
    if not skew:
        return [1.0] * experts
    if abs(skew - 1) < 1e-9:
        return [math.exp(random.random() * math.log(_RANGE)) for _ in range(experts)]
    exponent = 1 - skew
    whole, root = _RANGE**exponent - 1, 1 / exponent
    return [(1 + random.random() * whole) ** root for _ in range(experts)]


def _distinct(random: Random, cumulated: list[float], chosen: list[float], top_k: int) -> set[int]:
    """The experts of one row, all different."""
    experts, total, last = range(len(chosen)), cumulated[-1], len(chosen) - 1
    found: set[int] = set()
    for _ in range(top_k + 4):
        found.add(bisect(cumulated, random.random() * total, 0, last))
        if len(found) == top_k:
            break
    else:  # few experts, or a few that nearly all rows choose
        rest = sorted(
            (e for e in experts if e not in found), key=lambda e: -(random.random() ** (1 / max(chosen[e], 1e-12)))
        )
        found.update(rest[: top_k - len(found)])
    return found
