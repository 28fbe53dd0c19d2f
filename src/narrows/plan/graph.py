"""The graph that the search walks: every legal next op from every state, for one chain, mesh and named layout.

A node is a stage that is yet to run, the layout of each live field, and which rows are held. Its edges (moves, adds,
selections) stay before the same stage; its runs lead past the stage. The graph has no prices, so one graph serves every
shape of step. Nodes are made when a search first asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, Protocol

from narrows.arch.stages import Chain, Field, PriceClass, RowSet, Stage, StageKind
from narrows.cost.price import Source
from narrows.cost.pricer import OpPrice
from narrows.layout import (
    Algorithm,
    Encoding,
    Layout,
    Mesh,
    Move,
    MoveKind,
    Topology,
    full,
    group,
    legal_layouts,
    moves_from,
    scattered,
)
from narrows.plan.named import NamedLayout
from narrows.plan.plan import ALL_REDUCE_NORM, Op, OpKind

__all__ = ["Graph", "Node", "Prices", "State"]

State = tuple[int, ...]
"""Layout index of each bundle (ABSENT if not live), then 0 for all rows or 1 once rows are selected."""

ABSENT = -1
_ROW_SETS = (RowSet.ALL, RowSet.LOGITS)


class Prices(Protocol):
    """What a search asks of `cost`. What a move, an add or a selection costs does not depend on the stage after it."""

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice: ...
    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice: ...
    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice: ...
    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice: ...
    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice: ...
    def select(self, layout: Layout, row_bytes: int) -> OpPrice: ...


Edge = tuple[int, Op]
"""The index of its price in ``Graph.asks``, and the op, its price still blank."""


class Node:
    """A state before a stage. ``edges`` lead to other states before it, ``runs`` to those after it: by the stage alone,
    or in one op with the all-reduce before it."""

    __slots__ = ("edges", "runs", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self.edges: tuple[tuple[Node, Edge], ...] | None = None
        self.runs: tuple[tuple[State, Edge], ...] = ()


class Graph:
    """All ways through ``chain`` on ``mesh`` that ``rules`` leave.

    ``encoding``: what the rows of a field that may be encoded can travel as in a gather, beside plain; ``always``:
    plain gathers of such fields are left out, whatever encoding costs. ``fuses_norms``: the device may have a price for
    an all-reduce and the norm after it in one op. ``topology``: how ranks lie on nodes; None: all on one.
    """

    def __init__(
        self,
        chain: Chain,
        mesh: Mesh,
        rules: NamedLayout,
        encoding: Encoding = Encoding.PLAIN,
        *,
        always: bool = False,
        fuses_norms: bool = False,
        topology: Topology | None = None,
    ) -> None:
        self.chain, self.mesh, self.rules = chain, mesh, rules
        self._encoding, self._always = encoding, always
        self._fuses_norms = fuses_norms and rules.fuses_norms
        self.asks: list[Callable[[Prices], OpPrice]] = []
        self._ask_index: dict[tuple[Any, ...], int] = {}
        self._layouts = legal_layouts(mesh)
        self._index = {layout: i for i, layout in enumerate(self._layouts)}
        self._scattered = self._index[scattered(mesh)]
        self._titles = {title: self._index[layout] for title, layout in _titles(mesh).items()}
        bundles: dict[str, list[Field]] = {}
        for field in chain.fields.values():
            bundles.setdefault(field.bundle, []).append(field)
        self._bundles = tuple(bundles)
        self._slot = {name: self._bundles.index(field.bundle) for name, field in chain.fields.items()}
        self._stream = self._slot[chain.roles.stream]
        self._residual = self._slot[chain.roles.residual]
        self._others = [self._slot[name] for name in chain.roles.addends if name != chain.roles.residual]
        self._names = [tuple(field.name for field in fields) for fields in bundles.values()]
        self._row_bytes = [sum(field.row_bytes for field in fields) for fields in bundles.values()]
        self._encoded_bytes = [
            sum(encoding.row_bytes(field.width, field.itemsize) for field in fields) for fields in bundles.values()
        ]
        nodes = topology if rules.hierarchical else None
        self._moves = [[(move, self._index[move.dst]) for move in moves_from(mesh, at, nodes)] for at in self._layouts]
        self._made: dict[tuple[Any, ...], Edge] = {}
        self._ask_of: dict[Op, int] = {}
        self._nodes: dict[tuple[tuple[str, bool, int | None], State], Node] = {}

    def start(self) -> State:
        """Before the first stage: the token ids, everywhere."""
        state = [ABSENT] * (len(self._bundles) + 1)
        state[self._slot[self.chain.roles.input]] = self._index[full(self.mesh)]
        state[-1] = 0
        return tuple(state)

    def node(self, stage: Stage, state: State) -> Node:
        """The node of ``state`` before ``stage``; stages are distinguished by their keys."""
        node = self._nodes.get((stage.key, state))
        if node is None:
            node = self._nodes[stage.key, state] = Node(state)
            node.runs = tuple(self._runs(state, stage))
        return node

    def edges(self, stage: Stage, node: Node) -> tuple[tuple[Node, Edge], ...]:
        """What can be done at ``node`` before ``stage`` runs."""
        if node.edges is None:
            node.edges = tuple((self.node(stage, after), edge) for after, edge in self._edges(node.state, stage))
        return node.edges

    def ask_of(self, op: Op) -> int:
        """The index in ``asks`` of the price of an op that a search of this graph has found."""
        if len(self._ask_of) != len(self._made):
            self._ask_of = {blank: ask for ask, blank in self._made.values()}
        return self._ask_of[_blank(op)]

    # -- which ops may come next -------------------------------------------------------------------------------------

    def _edges(self, state: State, stage: Stage) -> Iterator[tuple[State, Edge]]:
        if stage.kind is StageKind.NORM:
            yield from self._adds(state, stage)
        if stage.after_selection and state[-1] == 0 and self._may_select(stage):
            yield self._select(state, stage)
        by_layout: dict[int, list[int]] = {}
        for slot in range(len(self._bundles)):
            if state[slot] != ABSENT:
                by_layout.setdefault(state[slot], []).append(slot)
        for layout_index, slots in by_layout.items():
            for move, dst in self._moves[layout_index]:
                if not self._may_move(move, stage):
                    continue
                packs = len(slots) if move.kind is MoveKind.ALL_GATHER else 1
                for size in range(1, packs + 1):
                    for chosen in combinations(slots, size):
                        after = list(state)
                        for slot in chosen:
                            after[slot] = dst
                        for encoded in self._encodable(move, chosen, stage):
                            yield tuple(after), self._move(move, dst, chosen, encoded, state, stage)

    def _adds(self, state: State, stage: Stage) -> Iterator[tuple[State, Edge]]:
        stream = state[self._stream]
        if stream == ABSENT:
            return
        layout = self._layouts[stream]
        allowed = self.rules.residual_of(stage)
        for name in self.chain.roles.addends:
            slot = self._slot[name]
            if state[slot] == ABSENT:
                continue
            joins = layout.owes_sum
            # An addend may join an owed sum only where it is sharded over the axes that owe it: else it counts twice.
            if state[slot] != (self._scattered if joins else stream) or layout.holds_columns:
                continue
            if slot == self._residual and allowed is not None and ("joined" if joins else "added") not in allowed:
                continue
            after = list(state)
            after[slot] = ABSENT
            yield tuple(after), self._add(name, stream, state[slot], state[-1], stage)

    def _may_select(self, stage: Stage) -> bool:
        return self.rules.select_before is None or stage.role in self.rules.select_before

    def _encodable(self, move: Move, slots: tuple[int, ...], stage: Stage) -> Iterator[tuple[int, ...]]:
        """Which of ``slots`` may travel encoded together: no slot first, so that ties go to plain rows.

        What is gathered before a norm is about to enter the residual stream, and stays what it is.
        """
        may: tuple[int, ...] = ()
        if (
            self._encoding is not Encoding.PLAIN
            and move.kind is MoveKind.ALL_GATHER
            and stage.kind is not StageKind.NORM
        ):
            may = tuple(slot for slot in slots if self.chain.roles.encodable.issuperset(self._names[slot]))
        for size in range(len(may) if self._always else 0, len(may) + 1):
            yield from combinations(may, size)

    def _may_move(self, move: Move, stage: Stage) -> bool:
        if move.src.owes_sum:
            allowed = self.rules.sums_before(stage)
            return allowed is None or move.kind in allowed
        return True

    def _run(self, state: State, stage: Stage) -> tuple[State, Edge] | None:
        """The state after ``stage``, if it can run in ``state``."""
        if not (stage.after_selection if state[-1] else stage.row_set is RowSet.ALL):
            return None
        fused = False
        reads = {self._slot[name] for name in stage.reads}
        if stage.kind is StageKind.NORM:
            if any(state[slot] != ABSENT for slot in self._others):
                return None
            fused = state[self._residual] != ABSENT
            if not fused:
                reads.discard(self._residual)
            allowed = self.rules.residual_of(stage)
            if fused and allowed is not None and "fused" not in allowed:
                return None
        held = {state[slot] for slot in reads}
        if len(held) != 1 or ABSENT in held:
            return None
        (index,) = held
        layout = self._layouts[index]
        if stage.accepts is not None:
            if layout != stage.accepts:
                return None
        elif not layout.is_whole or not self._row_stage_at(stage, index):
            return None
        leaves = index if stage.leaves is None else self._index[stage.leaves]
        after = list(state)
        for name in stage.frees:
            after[self._slot[name]] = ABSENT
        for name in stage.writes:
            after[self._slot[name]] = leaves
        return tuple(after), self._stage(stage, index, leaves, fused, state[-1])

    def _runs(self, state: State, stage: Stage) -> Iterator[tuple[State, Edge]]:
        run = self._run(state, stage)
        if run is not None:
            yield run
        slot = self._stream
        if not self._fuses_norms or stage.kind is not StageKind.NORM or state[slot] == ABSENT:
            return
        for move, dst in self._moves[state[slot]]:
            if move.kind is MoveKind.ALL_REDUCE and move.algorithm is Algorithm.FLAT and self._may_move(move, stage):
                reduced = (*state[:slot], dst, *state[slot + 1 :])
                run = self._run(reduced, stage)
                if run is not None:
                    after, (_, normed) = run
                    yield after, self._reduce_norm(move, dst, normed, state, stage)

    def _row_stage_at(self, stage: Stage, index: int) -> bool:
        titles = self.rules.rows_of(stage)
        return titles is None or any(self._titles[title] == index for title in titles)

    # -- the ops -----------------------------------------------------------------------------------------------------

    def _stage(self, stage: Stage, index: int, leaves: int, fused: bool, selected: int) -> Edge:
        cost = ("stage", stage.name, stage.window, index, fused, selected)
        key = (*cost, stage.any_rows)
        if (made := self._made.get(key)) is not None:
            return made
        layout, row_set = self._layouts[index], _ROW_SETS[selected]
        reads = stage.reads
        if stage.kind is StageKind.NORM and not fused:
            reads = tuple(name for name in reads if name != self.chain.roles.residual)
        return self._edge(
            key,
            cost,
            lambda prices: prices.stage(stage, layout, fused, row_set),
            kind=OpKind.STAGE,
            name=stage.name,
            boundary=stage.name,
            price_class=stage.price_class,
            reads=reads,
            reads_at=(layout,) * len(reads),
            writes=stage.writes,
            writes_at=(self._layouts[leaves],) * len(stage.writes),
            row_set=row_set,
            stage=stage,
            fused=fused,
        )

    def _move(
        self, move: Move, dst: int, slots: tuple[int, ...], encoded: tuple[int, ...], state: State, stage: Stage
    ) -> Edge:
        src, selected, levelled = state[slots[0]], state[-1], move.algorithm is Algorithm.HIERARCHICAL
        key = ("move", stage.name, slots, encoded, src, dst, selected, levelled)
        if (made := self._made.get(key)) is not None:
            return made
        row_set = _ROW_SETS[selected]
        row_bytes = sum((self._encoded_bytes if slot in encoded else self._row_bytes)[slot] for slot in slots)
        names = tuple(name for slot in slots for name in self._names[slot])
        travels = tuple(
            self._encoding if slot in encoded else Encoding.PLAIN for slot in slots for _ in self._names[slot]
        )
        recoded = tuple(self._row_bytes[slot] + self._encoded_bytes[slot] for slot in encoded)

        def ask(prices: Prices) -> OpPrice:
            """The gather, and per encoded field one pass over its rows before and one after."""
            price = prices.move(move, row_bytes, row_set)
            for both in recoded:
                price = price.plus(prices.recode(move.src, both, row_set)).plus(prices.recode(move.dst, both, row_set))
            return price

        return self._edge(
            key,
            ("move", src, dst, row_bytes, recoded, selected, levelled),
            ask,
            kind=OpKind.MOVE,
            name=move.kind.value,
            boundary=stage.name,
            price_class=PriceClass.COMMUNICATION,
            reads=names,
            reads_at=(move.src,) * len(names),
            writes=names,
            writes_at=(move.dst,) * len(names),
            row_set=row_set,
            move=move,
            encodings=travels if encoded else (),
        )

    def _reduce_norm(self, move: Move, dst: int, normed: Op, state: State, stage: Stage) -> Edge:
        """``move`` of the stream and ``normed``, the norm after it, as one op."""
        slot, selected, fused = self._stream, state[-1], normed.fused
        cost = (ALL_REDUCE_NORM, stage.name, state[slot], dst, fused, selected)
        key = (*cost, stage.any_rows)
        if (made := self._made.get(key)) is not None:
            return made
        row_set, row_bytes = _ROW_SETS[selected], self._row_bytes[slot]
        return self._edge(
            key,
            cost,
            lambda prices: prices.reduce_norm(move, stage, fused, row_bytes, row_set),
            kind=OpKind.MOVE,
            name=ALL_REDUCE_NORM,
            boundary=stage.name,
            price_class=PriceClass.COMMUNICATION,
            reads=normed.reads,
            reads_at=(move.src, *normed.reads_at[1:]),
            writes=normed.writes,
            writes_at=normed.writes_at,
            row_set=row_set,
            stage=stage,
            move=move,
            fused=fused,
        )

    def _add(self, addend: str, stream: int, at: int, selected: int, stage: Stage) -> Edge:
        row_bytes, row_set, layout = self._row_bytes[self._stream], _ROW_SETS[selected], self._layouts[at]
        name, to = self.chain.roles.stream, self._layouts[stream]
        return self._edge(
            ("add", stage.name, addend, stream, at, selected),
            ("add", at, selected, to.owes_sum),
            lambda prices: prices.add(layout, row_bytes, row_set, joins=to.owes_sum),
            kind=OpKind.ADD,
            name=f"add_{addend}",
            boundary=stage.name,
            price_class=PriceClass.ADD,
            reads=(name, addend),
            reads_at=(to, layout),
            writes=(name,),
            writes_at=(to,),
            row_set=row_set,
        )

    def _select(self, state: State, stage: Stage) -> tuple[State, Edge]:
        slots = sorted((i for i, at in enumerate(state[:-1]) if at != ABSENT), key=lambda i: i != self._stream)
        names = tuple(name for slot in slots for name in self._names[slot])
        layouts = tuple(self._layouts[state[slot]] for slot in slots for _ in self._names[slot])
        row_bytes = sum(self._row_bytes[slot] for slot in slots)
        edge = self._edge(
            ("select", stage.name, state),
            ("select", layouts[0], row_bytes),
            lambda prices: prices.select(layouts[0], row_bytes),
            kind=OpKind.SELECT,
            name=OpKind.SELECT.value,
            boundary=stage.name,
            price_class=PriceClass.LM_HEAD,
            reads=names,
            reads_at=layouts,
            writes=names,
            writes_at=layouts,
            row_set=RowSet.LOGITS,
        )
        return (*state[:-1], 1), edge

    def _edge(self, key: tuple[Any, ...], cost: tuple[Any, ...], ask: Callable[[Prices], OpPrice], **what: Any) -> Edge:
        """The edge called ``key``; those with equal ``cost`` share one ask."""
        index = self._ask_index.get(cost)
        if index is None:
            index = self._ask_index[cost] = len(self.asks)
            self.asks.append(ask)
        edge = self._made[key] = (index, Op(rows=0, nbytes=0, ps=0, source=Source.MEASURED, **what))
        return edge


def _blank(op: Op) -> Op:
    """The op as the graph has it: no rows, and no price."""
    return replace(op, rows=0, nbytes=0, ps=0, source=Source.MEASURED, error_ps=None)


def _titles(mesh: Mesh) -> dict[str, Layout]:
    return {"FULL": full(mesh), "GROUP": group(mesh), "SCATTERED": scattered(mesh)}
