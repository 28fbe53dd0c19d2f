"""Prices a plan's ops at other row counts than the plan was made for.

A plan runs every step of its bucket (:mod:`narrows.plan.cache`), so its price is that of the bucket's upper end. Here
it is the price of the step at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

from narrows.arch.stages import PriceClass
from narrows.cost.price import Source
from narrows.plan.graph import Graph, Prices
from narrows.plan.plan import Plan

__all__ = ["Repriced", "Repricer"]

Repriced = Mapping[tuple[PriceClass, Source], int]
"""Predicted picoseconds of a step, by what they are for and how well they are known."""


class Repricer:
    """Prices one plan again and again. ``graph`` is the one that it was found in."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan, self._graph = plan, graph
        counts: dict[tuple[PriceClass, int], int] = {}
        for segment in plan.segments:
            for op in segment.ops:
                key = op.price_class, graph.ask_of(op)
                counts[key] = counts.get(key, 0) + segment.times
        self._counts = tuple((price_class, ask, times) for (price_class, ask), times in counts.items())

    def at(self, prices: Prices) -> Repriced:
        """The plan's picoseconds by these prices; at the shape that it was planned for their sum is ``Plan.ps``."""
        out: dict[tuple[PriceClass, Source], int] = {}
        for price_class, ask, times in self._counts:
            price = self._graph.asks[ask](prices)
            key = price_class, price.source
            out[key] = out.get(key, 0) + price.ps * times
        return out
