"""The search: the cheapest path through a model's chain of stages, exactly.

Prices are integer picoseconds, so the cost of a path does not depend on the order of addition. Ties go to the path with
fewer ops, then to the edge that is generated first.

Between two layers, after a norm and after attention, only few states can occur: what the last stage leaves, and where
the residual is. The stages up to each of those points are solved once per entry state, and the tables are chained
(min-plus). That is the optimum of the plain search at the cost of two and a half layers, because layers share tables.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from narrows.arch.stages import Stage
from narrows.cost.pricer import OpPrice
from narrows.errors import PlanError
from narrows.plan.graph import Edge, Graph, Node, Prices, State
from narrows.plan.plan import Op, Segment

__all__ = ["Search"]

_PS = 1 << 20
"""Weight of a picosecond, where an op weighs 1 besides its price: of two paths with equal cost the one with fewer
ops is lighter. No plan has a million ops."""


@dataclass(slots=True)
class _Path:
    """A best path so far: its weight, what was done last (one edge, or a path of a table), and the path before that."""

    weight: int
    before: _Path | None = None
    last: Edge | _Path | None = None

    def edges(self) -> tuple[Edge, ...]:
        parts: list[tuple[Edge, ...]] = []
        path: _Path | None = self
        while path is not None and path.last is not None:
            parts.append(path.last.edges() if isinstance(path.last, _Path) else (path.last,))
            path = path.before
        return tuple(edge for part in reversed(parts) for edge in part)


_ROOT = _Path(0)
Frontier = dict[State, _Path]


class _Weights(dict[int, int]):
    """Weight of each ask of a graph, priced when first needed."""

    def __init__(self, price_of: Callable[[int], OpPrice]) -> None:
        self.price_of = price_of
        self.step_prices: dict[int, OpPrice] = {}

    def __missing__(self, ask: int) -> int:
        price = self.step_prices[ask] = self.price_of(ask)
        weight = self[ask] = price.ps * _PS + 1
        return weight


class Search:
    """Searches one graph for one source of prices: ``prices``, or a function that prices each of the graph's asks."""

    def __init__(self, graph: Graph, prices: Prices | Callable[[int], OpPrice]) -> None:
        self.graph, self.chain = graph, graph.chain
        self._weights = _Weights(prices if callable(prices) else lambda ask: graph.asks[ask](prices))
        self._tables: dict[tuple[tuple[tuple[str, bool, int | None], ...], State], Frontier] = {}

    # -- whole models ------------------------------------------------------------------------------------------------

    def solve(self) -> tuple[Segment, ...]:
        """The cheapest plan, by one table per layer type, chained.

        Raises:
            PlanError: the rules leave no way through; the stage that cannot be reached is named.
        """
        return self._segments(self._cheapest())

    def asks(self) -> tuple[int, ...]:
        """The prices of the cheapest plan's ops, by their index in ``Graph.asks``, each op of each layer in order.

        Raises:
            PlanError: as :meth:`solve`.
        """
        return tuple(ask for ask, _ in self._cheapest().edges())

    def ps(self) -> int:
        """Picoseconds of the cheapest plan.

        Raises:
            PlanError: as :meth:`solve`.
        """
        return self._cheapest().weight // _PS

    def _cheapest(self) -> _Path:
        chain = self.chain
        layers: dict[tuple[int, State], Frontier] = {}

        def layer_table(type_index: int, entry: State) -> Frontier:
            table = layers.get((type_index, entry))
            if table is None:
                stages = chain.layer_types[type_index].stages
                table = layers[type_index, entry] = self._through(entry, _blocks(stages))
            return table

        frontier = _extend({self.graph.start(): _ROOT}, lambda entry: self._through(entry, (chain.prologue,)))
        for type_index in chain.layers:
            frontier = _extend(frontier, partial(layer_table, type_index))
        frontier = _extend(frontier, lambda entry: self._through(entry, (chain.epilogue,)))
        if not frontier:
            self.solve_plainly()  # says which stage cannot be reached
        return min(frontier.values(), key=lambda path: path.weight)

    def solve_plainly(self) -> tuple[int, int]:
        """Cost in picoseconds and number of ops of the optimum, by one search over all stages.

        Raises:
            PlanError: the rules leave no way through; the stage that cannot be reached is named.
        """
        stages = list(self.chain.prologue)
        for type_index in self.chain.layers:
            stages += self.chain.layer_types[type_index].stages
        frontier: Frontier = {self.graph.start(): _ROOT}
        for stage in (*stages, *self.chain.epilogue):
            frontier = self._advance(frontier, stage)
            if not frontier:
                rules, mesh = self.graph.rules, self.graph.mesh
                raise PlanError(f"layout {rules.name} leaves no way to run {stage.name} on {mesh}")
        return divmod(min(path.weight for path in frontier.values()), _PS)

    def _segments(self, path: _Path) -> tuple[Segment, ...]:
        parts: list[_Path] = []
        while path.before is not None:
            assert isinstance(path.last, _Path)
            parts.append(path.last)
            path = path.before
        last, *middle, first = parts
        segments = [Segment(name="before", layers=(), ops=self._ops(first))]
        runs: list[tuple[_Path, list[int]]] = []
        for layer, part in enumerate(reversed(middle)):
            if runs and runs[-1][0] is part:
                runs[-1][1].append(layer)
            else:
                runs.append((part, [layer]))
        for part, layers in runs:
            name = self.chain.layer_types[self.chain.layers[layers[0]]].name
            segment = Segment(name=name, layers=tuple(layers), ops=self._ops(part))
            if _alike(segments[-1], segment):
                before = segments.pop()
                segment = replace(before, layers=(*before.layers, *layers))
            segments.append(segment)
        return (*segments, Segment(name="after", layers=(), ops=self._ops(last)))

    def _ops(self, path: _Path) -> tuple[Op, ...]:
        ops = []
        for ask, op in path.edges():
            price = self._weights.step_prices[ask]
            ops.append(
                replace(
                    op,
                    rows=price.rows,
                    nbytes=price.nbytes,
                    ps=price.ps,
                    source=price.source,
                    error_ps=price.error,
                )
            )
        return tuple(ops)

    # -- tables ------------------------------------------------------------------------------------------------------

    def _through(self, entry: State, blocks: Sequence[tuple[Stage, ...]]) -> Frontier:
        """From one state to every state after ``blocks``; empty if the rules leave no way."""
        frontier: Frontier = {entry: _ROOT}
        for block in blocks:
            frontier = _extend(frontier, partial(self._block, block))
        return frontier

    def _block(self, block: tuple[Stage, ...], entry: State) -> Frontier:
        keys = tuple(stage.key for stage in block)
        table = self._tables.get((keys, entry))
        if table is None:
            table = {entry: _ROOT}
            for stage in block:
                table = self._advance(table, stage)
            self._tables[keys, entry] = table
        return table

    # -- one stage ---------------------------------------------------------------------------------------------------

    def _advance(self, frontier: Frontier, stage: Stage) -> Frontier:
        """From paths that end before ``stage`` to the best path to every state after it.

        Dijkstra over the states that moves, adds and selection reach before the stage runs.
        """
        graph, weights = self.graph, self._weights
        reached: Frontier = {}
        best: dict[Node, int] = {}
        heap: list[tuple[int, int, Node, _Path, Edge | None]] = []
        for count, (state, path) in enumerate(frontier.items()):
            node = graph.node(stage, state)
            best[node] = path.weight
            heap.append((path.weight, count, node, path, None))
        heapq.heapify(heap)
        count = len(heap)
        while heap:
            weight, _, node, before, edge = heapq.heappop(heap)
            if weight > best[node]:
                continue  # a lighter way was found after this one was pushed
            path = before if edge is None else _Path(weight, before, edge)
            for after_state, run in node.runs:
                after_weight = weight + weights[run[0]]
                old = reached.get(after_state)
                if old is None or after_weight < old.weight:
                    reached[after_state] = _Path(after_weight, path, run)
            for after, edge in node.edges if node.edges is not None else graph.edges(stage, node):
                after_weight = weight + weights[edge[0]]
                known = best.get(after)
                if known is None or after_weight < known:
                    best[after] = after_weight
                    heapq.heappush(heap, (after_weight, count, after, path, edge))
                    count += 1
        return reached


def _alike(one: Segment, other: Segment) -> bool:
    """Whether two kinds of layers do the same: the last one has its own stages, and may use them like the others."""
    return (one.name, len(one.ops)) == (other.name, len(other.ops)) and all(
        replace(a, stage=None) == replace(b, stage=None) for a, b in zip(one.ops, other.ops, strict=True)
    )


def _extend(frontier: Frontier, table_of: Callable[[State], Frontier]) -> Frontier:
    """The best path to every state that the tables of the states in ``frontier`` lead to."""
    reached: Frontier = {}
    for state, path in frontier.items():
        for after, part in table_of(state).items():
            weight = path.weight + part.weight
            old = reached.get(after)
            if old is None or weight < old.weight:
                reached[after] = _Path(weight, path, part)
    return reached


def _blocks(stages: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], ...]:
    """``stages`` cut where few states are possible."""
    cuts = [i + 1 for i, stage in enumerate(stages) if stage.cut_after]
    return tuple(stages[start:end] for start, end in pairwise(sorted({0, *cuts, len(stages)})))
