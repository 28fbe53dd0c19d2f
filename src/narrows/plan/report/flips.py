"""At which error of which price another way of moving rows would be the cheapest.

The prices of one group (all-reduces over tp, the products, the norms and other passes over rows ...) are multiplied by
a factor, all others stay, and the step is searched again: every legal plan is compared, not only the named ones. The
cost of a plan is a straight line in the factor, so the least factor at which the choice changes is where two lines
cross. The choice is how rows travel in most layers; weights stay held as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from narrows.arch.stages import PriceClass, RowSet, Stage
from narrows.cost.bands import KIND_WORDS, KINDS
from narrows.cost.pricer import NOTHING, OpPrice, Pricer
from narrows.layout import Algorithm, Layout, Move, MoveKind
from narrows.plan.graph import Graph
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.plan.report.explain import describe
from narrows.plan.search import Search

__all__ = ["LARGEST_FACTOR", "Flip", "flips"]

LARGEST_FACTOR = 2.0
"""Prices are taken to be at most so many times too high or too low."""
_CLOSE = 1.01
"""How near the factor is found: within 1 %."""
_LAUNCH = "the launch of each op"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """If the prices of ``group`` were ``factor`` times what they are, rows would travel by ``words``.

    ``layout``: the named layout that does so; empty if none of those compared does. ``cost``: what the choice of now
    would then cost more, which is nothing at the factor and grows beyond it, as a share at ``LARGEST_FACTOR``.
    """

    group: str
    factor: float
    words: str
    layout: str = ""
    cost: float = 0.0

    def __str__(self) -> str:
        percent = 100 * abs(self.factor - 1)
        then = self.layout or self.words
        return f"{self.group} cost {percent:.0f} % {'more' if self.factor > 1 else 'less'}: then {then}"


class _Groups:
    """Takes an ask of a graph for its prices, and says which group they are of."""

    def __init__(self) -> None:
        self.group = ""

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        if stage.accepts is None:  # else it runs alike in every plan
            self.group = self.group or KIND_WORDS[KINDS[stage.price_class]]
        return NOTHING

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        kind = move.kind.value.replace("_", "-")
        how = "" if move.algorithm is Algorithm.FLAT else f", {move.algorithm}"
        self.group = "" if move.kind is MoveKind.SLICE else f"{kind} over {move.axes}{how}"
        return NOTHING

    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self.move(move, row_bytes, row_set)

    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice:
        return self._passes()

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        return NOTHING

    def select(self, layout: Layout, row_bytes: int) -> OpPrice:
        return self._passes()

    def _passes(self) -> OpPrice:
        self.group = KIND_WORDS[KINDS[PriceClass.ADD]]
        return NOTHING


@dataclass(slots=True)
class _Choice:
    """A plan that a search found: its picoseconds at the prices as they are, and of these what the group is."""

    words: str
    ps: int
    part: int

    def at(self, factor: float) -> float:
        return self.ps + (factor - 1) * self.part


class _Step:
    """One step whose prices can be scaled by group."""

    def __init__(self, graph: Graph, prices: Pricer, plan: Plan) -> None:
        self._graph, self._prices, self._plan = graph, prices, plan
        self._known: dict[int, OpPrice] = {}
        self._groups: dict[int, str] = {}
        self._words: dict[tuple[int, ...], str] = {}
        self._launch = round(prices.device.launch_s * 1e12)

    def price(self, ask: int) -> OpPrice:
        found = self._known.get(ask)
        if found is None:
            found = self._known[ask] = self._graph.asks[ask](self._prices)
        return found

    def group(self, ask: int) -> str:
        found = self._groups.get(ask)
        if found is None:
            groups = _Groups()
            self._graph.asks[ask](groups)
            found = self._groups[ask] = groups.group
        return found

    def part(self, ask: int, group: str) -> int:
        """Of the price of ``ask``, what ``group`` is."""
        price = self.price(ask)
        if group == _LAUNCH:
            return min(self._launch, price.ps)
        return price.ps if self.group(ask) == group else 0

    def groups(self) -> tuple[str, ...]:
        """All that were looked up so far, and launches."""
        found = (group for group in map(self.group, self._known) if group)
        return (*sorted(dict.fromkeys(found)), _LAUNCH)

    def best(self, group: str, factor: float) -> _Choice:
        """The cheapest plan where the prices of ``group`` are ``factor`` times as high."""

        def price_of(ask: int) -> OpPrice:
            price = self.price(ask)
            part = self.part(ask, group)
            return replace(price, ps=price.ps + round((factor - 1) * part)) if part else price

        search = Search(self._graph, price_of)
        asks = search.asks()
        words = self._words.get(asks)
        if words is None:
            words = self._words[asks] = describe(replace(self._plan, segments=search.solve()))
        return self._choice(words, Counter(asks), group)

    def now(self, group: str) -> _Choice:
        """The plan as it is."""
        asks: Counter[int] = Counter()
        for segment in self._plan.segments:
            for op in segment.ops:
                asks[self._graph.ask_of(op)] += segment.times
        return self._choice(describe(self._plan), asks, group)

    def _choice(self, words: str, asks: Mapping[int, int], group: str) -> _Choice:
        return _Choice(
            words,
            sum(self.price(ask).ps * times for ask, times in asks.items()),
            sum(self.part(ask, group) * times for ask, times in asks.items()),
        )


def flips(planner: Planner, plan: Plan, named: Sequence[Plan] = ()) -> tuple[Flip, ...]:
    """For each group of prices the least factor, up and down, at which the choice changes; the nearest to 1 first.

    ``plan`` is `auto` by ``planner``; ``named``: plans of named layouts for the same step, by which a choice is called
    where rows travel alike.
    """
    step = _Step(planner.graph("auto"), planner.deployment.pricer(plan.shape), plan)
    step.best("", 1.0)  # asks for the prices of all ways that matter
    called = {describe(other): other.layout_name for other in reversed(named)}
    found = [
        flip
        for group in step.groups()
        for factor in (1 / LARGEST_FACTOR, LARGEST_FACTOR)
        if (flip := _flip(step, group, step.now(group), factor, called.get)) is not None
    ]
    return tuple(sorted(found, key=lambda flip: max(flip.factor, 1 / flip.factor)))


def _flip(step: _Step, group: str, now: _Choice, factor: float, called: Callable[[str, str], str]) -> Flip | None:
    far = step.best(group, factor)
    if far.words == now.words:
        return None
    cost = now.at(factor) / far.at(factor) - 1
    near, near_at, far_at = now, 1.0, factor
    while max(far_at / near_at, near_at / far_at) > _CLOSE:
        slope = near.part - far.part
        crossing = 1 + (far.ps - near.ps) / slope if slope else near_at
        # At the crossing itself both cost the same: a little beyond it the other is the cheaper one.
        at = crossing * (_CLOSE if factor > 1 else 1 / _CLOSE) ** 0.5
        if not min(near_at, far_at) < at < max(near_at, far_at):
            at = (near_at * far_at) ** 0.5
        between = step.best(group, at)
        if between.words == now.words:
            near, near_at = between, at
            continue
        # The cheapest cost is concave in the factor: where it is `far` at the crossing already, nothing lies between.
        is_last = (between.ps, between.part) == (far.ps, far.part)
        far, far_at = between, at
        if is_last:
            break
    return Flip(group=group, factor=far_at, words=far.words, layout=called(far.words, ""), cost=cost)
