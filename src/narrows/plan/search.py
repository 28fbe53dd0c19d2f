"""The search: the cheapest path through a model's chain of stages, exactly.

Knows the chain, the legal moves and a source of prices; not how prices come about, nor names of devices. A node is
(the next stage, the layout of each live field, which rows are held); an edge runs the stage, makes one move, adds an
addend, or selects rows. Prices are integer picoseconds, so a path's cost does not depend on how it is summed.

Between two layers only few states can occur (what the last stage of a layer leaves, and where the residual is), so
each layer type is solved once per entry state and the tables are chained: the optimum of the plain search, at the
cost of two layers. Ties go to fewer steps, then to the edge that is generated first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from narrows.arch.stages import Chain, Field, PriceClass, RowSet, Stage, StageKind
from narrows.cost.stage import StepPrice
from narrows.errors import PlanError
from narrows.layout import Layout, Mesh, Move, MoveKind, full, group, legal_layouts, moves_from, scattered
from narrows.plan.named import NamedLayout
from narrows.plan.plan import Segment, Step, StepKind

__all__ = ["Prices", "Search"]

State = tuple[int, ...]
"""Layout index of each bundle (ABSENT if not live), then 0 for all rows or 1 once rows are selected."""

ABSENT = -1
_ADDENDS = ("shared", "residual")
_ROW_SETS = (RowSet.ALL, RowSet.LOGITS)


class Prices(Protocol):
    """What the search asks of `cost`."""

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> StepPrice: ...
    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> StepPrice: ...
    def add(self, layout: Layout, row_bytes: int, row_set: RowSet) -> StepPrice: ...
    def select(self, layout: Layout, row_bytes: int) -> StepPrice: ...


@dataclass(frozen=True, slots=True)
class _Path:
    """A best path so far: its cost, its number of steps, its last step and the path before that."""

    ps: int
    num_steps: int
    step: Step | None = None
    before: _Path | None = None

    def then(self, step: Step) -> _Path:
        return _Path(self.ps + step.ps, self.num_steps + 1, step, self)

    def steps(self) -> tuple[Step, ...]:
        out: list[Step] = []
        path: _Path | None = self
        while path is not None and path.step is not None:
            out.append(path.step)
            path = path.before
        return tuple(reversed(out))


Frontier = dict[State, _Path]


class Search:
    """Searches one chain on one mesh under one named layout's rules and one source of prices."""

    def __init__(self, chain: Chain, mesh: Mesh, rules: NamedLayout, prices: Prices) -> None:
        self.chain, self.mesh, self.rules, self.prices = chain, mesh, rules, prices
        self.layouts = legal_layouts(mesh)
        self.index = {layout: i for i, layout in enumerate(self.layouts)}
        self.full, self.scattered = self.index[full(mesh)], self.index[scattered(mesh)]
        self.titles = {title: self.index[layout] for title, layout in _titles(mesh).items()}
        bundles: dict[str, list[Field]] = {}
        for field in chain.fields.values():
            bundles.setdefault(field.bundle, []).append(field)
        self.bundles = tuple(bundles)
        self.slot = {bundle: i for i, bundle in enumerate(self.bundles)}
        self.names = [tuple(f.name for f in fields) for fields in bundles.values()]
        self.row_bytes = [sum(f.row_bytes for f in fields) for fields in bundles.values()]
        self.moves = [[(move, self.index[move.dst]) for move in moves_from(mesh, layout)] for layout in self.layouts]
        self._edges: dict[tuple[str, State], list[tuple[State, Step]]] = {}
        self._steps: dict[tuple[Any, ...], Step] = {}

    # -- whole models ------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """Before the first stage: the token ids, everywhere."""
        state = [ABSENT] * (len(self.bundles) + 1)
        state[self.slot["ids"]] = self.full
        state[-1] = 0
        return tuple(state)

    def solve(self) -> tuple[Segment, ...]:
        """The cheapest plan, by one table per layer type, chained.

        Raises:
            PlanError: the rules leave no way through; the stage that cannot be reached is named.
        """
        frontier = self.advance({self.start(): _Path(0, 0)}, self.chain.prologue)
        tables: dict[tuple[int, State], Frontier] = {}
        # best[state]: total cost, total steps, and the route (type, entry, exit) of every layer so far
        best: dict[State, tuple[int, int, _Route]] = {
            state: (path.ps, path.num_steps, _Route(None, path.steps())) for state, path in frontier.items()
        }
        for type_index in self.chain.layers:
            reached: dict[State, tuple[int, int, _Route]] = {}
            for entry, (ps, num_steps, route) in best.items():
                key = (type_index, entry)
                if key not in tables:
                    tables[key] = self.advance({entry: _Path(0, 0)}, self.chain.layer_types[type_index].stages)
                for leave, path in tables[key].items():
                    cost = (ps + path.ps, num_steps + path.num_steps)
                    if leave not in reached or cost < reached[leave][:2]:
                        reached[leave] = (*cost, _Route(route, path))
            best = reached
        final: tuple[int, int, _Route, _Path] | None = None
        for entry, (ps, num_steps, route) in best.items():
            for path in self.advance({entry: _Path(0, 0)}, self.chain.epilogue, selects=True).values():
                total = (ps + path.ps, num_steps + path.num_steps)
                if final is None or total < final[:2]:
                    final = (*total, route, path)
        assert final is not None
        return self._segments(final[2], final[3])

    def solve_plainly(self) -> tuple[int, int]:
        """Cost in picoseconds and number of steps of the optimum, by one search over all stages: for tests."""
        stages = list(self.chain.prologue)
        for type_index in self.chain.layers:
            stages += self.chain.layer_types[type_index].stages
        frontier = self.advance({self.start(): _Path(0, 0)}, stages)
        frontier = self.advance(frontier, self.chain.epilogue, selects=True)
        return min((path.ps, path.num_steps) for path in frontier.values())

    def _segments(self, route: _Route, last: _Path) -> tuple[Segment, ...]:
        paths: list[_Path] = []
        while route.before is not None:
            assert isinstance(route.part, _Path)
            paths.append(route.part)
            route = route.before
        assert isinstance(route.part, tuple)
        segments = [Segment(name="before", layers=(), steps=route.part)]
        runs: list[tuple[_Path, list[int]]] = []
        for layer, path in enumerate(reversed(paths)):
            if runs and runs[-1][0] is path:
                runs[-1][1].append(layer)
            else:
                runs.append((path, [layer]))
        for path, layers in runs:
            name = self.chain.layer_types[self.chain.layers[layers[0]]].name
            segments.append(Segment(name=name, layers=tuple(layers), steps=path.steps()))
        return (*segments, Segment(name="after", layers=(), steps=last.steps()))

    # -- one boundary, one stage -------------------------------------------------------------------------------------

    def advance(self, frontier: Frontier, stages: Sequence[Stage], *, selects: bool = False) -> Frontier:
        """From paths that end before ``stages[0]`` to the best path to every state after the last of them.

        ``selects``: the rows whose logits are asked for may be selected on the way.

        Raises:
            PlanError: no path of the rules leads through; the stage that cannot be reached is named.
        """
        for stage in stages:
            settled = self._settle(frontier, stage, selects)
            frontier = {}
            for state, path in settled.items():
                run = self._run(state, stage)
                if run is None:
                    continue
                after, step = run
                new, old = path.then(step), frontier.get(after)
                if old is None or (new.ps, new.num_steps) < (old.ps, old.num_steps):
                    frontier[after] = new
            if not frontier:
                raise PlanError(f"layout {self.rules.name} leaves no way to run {stage.name} on {self.mesh}")
        return frontier

    def _settle(self, frontier: Frontier, stage: Stage, selects: bool) -> Frontier:
        """Dijkstra within one boundary: every state reachable by moves, adds and selection before ``stage`` runs."""
        done: Frontier = {}
        heap = [(path.ps, path.num_steps, i, state, path) for i, (state, path) in enumerate(frontier.items())]
        heapq.heapify(heap)
        count = len(heap)
        while heap:
            ps, num_steps, _, state, path = heapq.heappop(heap)
            if state in done:
                continue
            done[state] = path
            edges = self._edges.get((stage.name, state))
            if edges is None:
                edges = self._edges[stage.name, state] = list(self._boundary_edges(state, stage, selects))
            for after, step in edges:
                if after not in done:
                    heapq.heappush(heap, (ps + step.ps, num_steps + 1, count, after, path.then(step)))
                    count += 1
        return done

    def _boundary_edges(self, state: State, stage: Stage, selects: bool) -> Iterator[tuple[State, Step]]:
        if stage.kind is StageKind.NORM:
            yield from self._adds(state, stage)
        if selects and state[-1] == 0 and self._may_select(stage):
            yield self._select(state, stage)
        by_layout: dict[int, list[int]] = {}
        for slot in range(len(self.bundles)):
            if state[slot] != ABSENT:
                by_layout.setdefault(state[slot], []).append(slot)
        for layout_index, slots in by_layout.items():
            for move, dst in self.moves[layout_index]:
                if not self._may_move(move, stage):
                    continue
                packs = len(slots) if move.kind is MoveKind.ALL_GATHER else 1
                for size in range(1, packs + 1):
                    for chosen in combinations(slots, size):
                        after = list(state)
                        for slot in chosen:
                            after[slot] = dst
                        yield tuple(after), self._move_step(move, chosen, state[-1], stage)

    def _adds(self, state: State, stage: Stage) -> Iterator[tuple[State, Step]]:
        hidden = state[self.slot["hidden"]]
        if hidden == ABSENT:
            return
        layout = self.layouts[hidden]
        allowed = self.rules.residual.get(stage.name)
        for name in _ADDENDS:
            slot = self.slot[name]
            if state[slot] == ABSENT:
                continue
            joins = layout.owes_sum
            # An addend may join an owed sum only where it is sharded over the axes that owe it: else it counts twice.
            if state[slot] != (self.scattered if joins else hidden) or layout.holds_columns:
                continue
            if name == "residual" and allowed is not None and ("joined" if joins else "added") not in allowed:
                continue
            after = list(state)
            after[slot] = ABSENT
            yield tuple(after), self._add_step(name, hidden, state[slot], state[-1], stage)

    def _may_select(self, stage: Stage) -> bool:
        return self.rules.select_before is None or stage.name in self.rules.select_before

    def _may_move(self, move: Move, stage: Stage) -> bool:
        if move.src.owes_sum:
            allowed = self.rules.sums_by.get(stage.name)
            return allowed is None or move.kind in allowed
        return True

    def _run(self, state: State, stage: Stage) -> tuple[State, Step] | None:
        """The state after ``stage``, if it can run in ``state``."""
        if (state[-1] == 1) is not (stage.row_set is RowSet.LOGITS) and stage.kind is not StageKind.NORM:
            return None
        fused = False
        reads = {self.slot[self.chain.fields[name].bundle] for name in stage.reads}
        if stage.kind is StageKind.NORM:
            if state[self.slot["shared"]] != ABSENT:
                return None
            fused = state[self.slot["residual"]] != ABSENT
            if not fused:
                reads.discard(self.slot["residual"])
            allowed = self.rules.residual.get(stage.name)
            if fused and allowed is not None and "fused" not in allowed:
                return None
        held = {state[slot] for slot in reads}
        if len(held) != 1 or ABSENT in held:
            return None
        (index,) = held
        layout = self.layouts[index]
        if stage.accepts is not None:
            if layout != stage.accepts:
                return None
        elif not layout.is_whole or not self._row_stage_at(stage, index):
            return None
        leaves = index if stage.leaves is None else self.index[stage.leaves]
        after = list(state)
        for name in stage.frees:
            after[self.slot[self.chain.fields[name].bundle]] = ABSENT
        for name in stage.writes:
            after[self.slot[self.chain.fields[name].bundle]] = leaves
        return tuple(after), self._stage_step(stage, index, leaves, fused, state[-1])

    def _row_stage_at(self, stage: Stage, index: int) -> bool:
        titles = self.rules.rows_at.get(stage.name)
        return titles is None or any(self.titles[title] == index for title in titles)

    # -- steps, made once per distinct edge --------------------------------------------------------------------------

    def _stage_step(self, stage: Stage, index: int, leaves: int, fused: bool, selected: int) -> Step:
        key = ("stage", stage.name, index, fused, selected)
        step = self._steps.get(key)
        if step is None:
            row_set = _ROW_SETS[selected]
            price = self.prices.stage(stage, self.layouts[index], fused, row_set)
            reads = stage.reads
            if stage.kind is StageKind.NORM and not fused:
                reads = tuple(name for name in reads if name != "residual")
            step = self._steps[key] = Step(
                kind=StepKind.STAGE,
                name=stage.name,
                boundary=stage.name,
                price_class=stage.price_class,
                reads=reads,
                reads_at=(self.layouts[index],) * len(reads),
                writes=stage.writes,
                writes_at=(self.layouts[leaves],) * len(stage.writes),
                row_set=row_set,
                rows=price.rows,
                nbytes=price.nbytes,
                ps=price.ps,
                source=price.source,
                stage=stage,
                fused=fused,
            )
        return step

    def _move_step(self, move: Move, slots: tuple[int, ...], selected: int, stage: Stage) -> Step:
        row_bytes = sum(self.row_bytes[slot] for slot in slots)
        names = tuple(name for slot in slots for name in self.names[slot])
        return self._row_step(
            ("move", move, slots, selected, stage.name),
            lambda: self.prices.move(move, row_bytes, _ROW_SETS[selected]),
            kind=StepKind.MOVE,
            name=move.kind.value,
            boundary=stage.name,
            price_class=PriceClass.COMMUNICATION,
            reads=names,
            reads_at=(move.src,) * len(names),
            writes=names,
            writes_at=(move.dst,) * len(names),
            row_set=_ROW_SETS[selected],
            move=move,
        )

    def _add_step(self, addend: str, hidden: int, at: int, selected: int, stage: Stage) -> Step:
        row_bytes = self.row_bytes[self.slot["hidden"]]
        return self._row_step(
            ("add", addend, hidden, at, selected, stage.name),
            lambda: self.prices.add(self.layouts[at], row_bytes, _ROW_SETS[selected]),
            kind=StepKind.ADD,
            name=f"add_{addend}",
            boundary=stage.name,
            price_class=PriceClass.ADD,
            reads=("hidden", addend),
            reads_at=(self.layouts[hidden], self.layouts[at]),
            writes=("hidden",),
            writes_at=(self.layouts[hidden],),
            row_set=_ROW_SETS[selected],
        )

    def _select(self, state: State, stage: Stage) -> tuple[State, Step]:
        slots = [self.slot[name] for name in ("hidden", *_ADDENDS) if state[self.slot[name]] != ABSENT]
        names = tuple(self.bundles[slot] for slot in slots)
        layouts = tuple(self.layouts[state[slot]] for slot in slots)
        step = self._row_step(
            ("select", names, layouts, stage.name),
            lambda: self.prices.select(layouts[0], sum(self.row_bytes[slot] for slot in slots)),
            kind=StepKind.SELECT,
            name=StepKind.SELECT.value,
            boundary=stage.name,
            price_class=PriceClass.LM_HEAD,
            reads=names,
            reads_at=layouts,
            writes=names,
            writes_at=layouts,
            row_set=RowSet.LOGITS,
        )
        return (*state[:-1], 1), step

    def _row_step(self, key: tuple[Any, ...], price_of: Callable[[], StepPrice], **what: Any) -> Step:
        step = self._steps.get(key)
        if step is None:
            price = price_of()
            step = Step(rows=price.rows, nbytes=price.nbytes, ps=price.ps, source=price.source, **what)
            self._steps[key] = step
        return step


@dataclass(frozen=True, slots=True)
class _Route:
    """The layers of a chained path: the part added last, and the route before it."""

    before: _Route | None
    part: _Path | tuple[Step, ...]


def _titles(mesh: Mesh) -> dict[str, Layout]:
    return {"FULL": full(mesh), "GROUP": group(mesh), "SCATTERED": scattered(mesh)}
