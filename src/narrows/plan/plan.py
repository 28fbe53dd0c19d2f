"""A plan: the frozen list of ops for a whole model, with each op's rows, bytes, predicted time and source of its price.

:meth:`Plan.validate` follows the layout of every field through the plan, and refuses an op that would read an owed sum
or another layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from narrows.arch.stages import FieldRoles, PriceClass, Role, RowSet, Stage, StageKind
from narrows.cost.bands import band, total_band
from narrows.cost.price import Source
from narrows.cost.pricer import NOTHING, OpPrice, StepShape
from narrows.errors import PlanError
from narrows.layout import Encoding, Layout, Mesh, Move, MoveKind, Topology, full, scattered

__all__ = ["ALL_REDUCE_NORM", "Op", "OpKind", "Plan", "Segment"]

ALL_REDUCE_NORM = "all_reduce_norm"
"""Name of the op that is an all-reduce and the norm after it at once: a MOVE that has a stage too."""


class OpKind(StrEnum):
    """What an op is."""

    STAGE = "stage"
    MOVE = "move"
    ADD = "add"
    SELECT = "select_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op of a plan, on every rank: a stage, a move between layouts, an addition or a selection of rows.

    ``reads_at`` and ``writes_at`` are the layouts of the fields in ``reads`` and ``writes``, one each. An ADD reads
    the stream and then an addend: where the stream still owes a sum (``joins``) the addend, scattered, joins it.
    ``boundary`` is the stage that the op prepares, or is. ``rows`` are those of the rank that has the most,
    ``nbytes`` the bytes of what a collective carries in all, or what local work moves on that rank. ``ps`` are
    predicted picoseconds: integers, so that sums do not depend on their order. ``encodings``: how each field read by a
    gather travels; such an op is encoding, gather and decoding in one, and its price is theirs. Empty: all plain.
    ``error_ps``: what its price may be off; None: what its source says.

    A MOVE with a stage is a reduction and the norm after it in one op, with its own price: it reads the
    stream where its sum is owed and, ``fused``, the residual where the norm leaves both.
    """

    kind: OpKind
    name: str
    boundary: str
    price_class: PriceClass
    reads: tuple[str, ...]
    reads_at: tuple[Layout, ...]
    writes: tuple[str, ...]
    writes_at: tuple[Layout, ...]
    row_set: RowSet
    rows: int
    nbytes: int
    ps: int
    source: Source
    stage: Stage | None = None
    move: Move | None = None
    fused: bool = False
    encodings: tuple[Encoding, ...] = ()
    error_ps: int | None = field(default=None, compare=False)

    @property
    def error(self) -> float:
        """Picoseconds that its price may be off (:mod:`narrows.cost.bands`)."""
        return self.ps * band(self.price_class, self.source) if self.error_ps is None else self.error_ps

    @property
    def layout(self) -> Layout:
        """The layout of the first field read: that of all of them, except for the addend of an ADD."""
        return self.reads_at[0]

    @property
    def leaves(self) -> Layout:
        """The layout of the first field written."""
        return self.writes_at[0]

    @property
    def seconds(self) -> float:
        return self.ps * 1e-12

    @property
    def encoded(self) -> dict[str, Encoding]:
        """The fields that do not travel plain, and what they travel as."""
        travels = zip(self.reads, self.encodings, strict=True) if self.encodings else ()
        return {name: encoding for name, encoding in travels if encoding is not Encoding.PLAIN}

    @property
    def joins(self) -> bool:
        """Whether this is an addend that joins a sum still owed."""
        return self.kind is OpKind.ADD and self.layout.owes_sum

    @property
    def is_collective(self) -> bool:
        """Whether ranks exchange here, so that none ends the op before all have begun it."""
        return self.move is not None and self.move.kind is not MoveKind.SLICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The same ops for one or more consecutive layers; ``layers`` is empty before and after the decoder layers."""

    name: str
    layers: tuple[int, ...]
    ops: tuple[Op, ...]

    @property
    def times(self) -> int:
        """How often the ops run."""
        return len(self.layers) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ops for a whole model on one mesh and one shape of step, under one named layout.

    ``roles``: what the fields of its ops are to the model. ``host_overhead``: what a step costs beside its ops, the
    same whatever the plan; nothing where that was never measured. ``nodes``: how ranks lie on nodes; None: all on one.
    """

    layout_name: str
    mesh: Mesh
    shape: StepShape
    segments: tuple[Segment, ...]
    roles: FieldRoles
    host_overhead: OpPrice = NOTHING
    nodes: Topology | None = None

    @property
    def ps(self) -> int:
        """Predicted picoseconds of the whole step."""
        return self.host_overhead.ps + sum(op.ps * segment.times for segment in self.segments for op in segment.ops)

    @property
    def seconds(self) -> float:
        return self.ps * 1e-12

    @property
    def num_ops(self) -> int:
        return sum(len(segment.ops) * segment.times for segment in self.segments)

    def ops(self) -> Iterator[tuple[int | None, Op]]:
        """Every op in order with its layer (None before and after the layers)."""
        for segment in self.segments:
            for layer in segment.layers or (None,):
                for op in segment.ops:
                    yield layer, op

    @property
    def band(self) -> float:
        """How far off the whole may be, as a share of it (:mod:`narrows.cost.bands`)."""
        ops = ((segment.times, op) for segment in self.segments for op in segment.ops)
        parts = [(op.price_class, op.ps * times, op.error * times) for times, op in ops]
        host, overhead = PriceClass.HOST, self.host_overhead
        return total_band([*parts, (host, overhead.ps, overhead.ps * band(host, overhead.source))])

    def totals(self) -> dict[PriceClass, float]:
        """Predicted seconds per price class, in the order of :class:`PriceClass`."""
        totals = dict.fromkeys(PriceClass, 0)
        totals[PriceClass.HOST] = self.host_overhead.ps
        for segment in self.segments:
            for op in segment.ops:
                totals[op.price_class] += op.ps * segment.times
        return {price_class: ps * 1e-12 for price_class, ps in totals.items()}

    @property
    def encodings(self) -> frozenset[Encoding]:
        """What rows are encoded as anywhere in the plan; empty where they all travel plain."""
        ops = (op for segment in self.segments for op in segment.ops)
        return frozenset(encoding for op in ops for encoding in op.encoded.values())

    @property
    def gives_logits(self) -> bool:
        """Whether it ends in whole rows of logits, of which tokens may be drawn, rather than in each shard's best."""
        return any(op.stage is not None and op.stage.role is Role.SAMPLE for op in self.segments[-1].ops)

    def num_nodes(self, op: Op) -> int:
        """On how many nodes the ranks of a group lie that exchange in ``op``; 1 for local ops."""
        if self.nodes is None or op.move is None or not op.is_collective:
            return 1
        return max(each.num_nodes for each in self.nodes.levels_along(self.mesh, op.move.first, op.move.last))

    @property
    def internode_seconds(self) -> float:
        """Predicted seconds of the ops whose groups lie on several nodes."""
        if self.nodes is None:
            return 0.0
        ops = ((op, segment.times) for segment in self.segments for op in segment.ops)
        return sum(op.ps * times for op, times in ops if self.num_nodes(op) > 1) * 1e-12

    def signature(self) -> tuple[object, ...]:
        """What the plan does, without rows and prices: equal signatures run the same ops."""
        return tuple(
            (
                segment.layers,
                tuple(
                    (s.kind, s.name, s.reads, s.reads_at, s.writes, s.writes_at, s.fused, s.row_set, s.encodings)
                    + ((s.move.algorithm,) if s.move is not None else ())
                    for s in segment.ops
                ),
            )
            for segment in self.segments
        )

    def validate(self) -> None:
        """Walk the layout of every field through the plan.

        Raises:
            PlanError: an op reads a field that is not there, whose sum is owed, or that has another layout; an addend
                would be counted twice, or lost; rows are selected of some fields only, or before a stage that needs
                all; a field is encoded that must not be, or an encoded one would enter the residual stream. The stage
                that the op is, or prepares, is named.
        """
        state: dict[str, Layout] = {self.roles.input: full(self.mesh)}
        selected = False
        rounded: dict[str, Encoding] = {}
        for layer, op in self.ops():
            where = op.name if op.kind is OpKind.STAGE else f"{op.name} before {op.boundary}"
            if layer is not None:
                where = f"layer {layer} {where}"
            for name, wanted in zip(op.reads, op.reads_at, strict=True):
                self._check(where, state, name, wanted, op)
            selected = _check_rows(where, op, selected, state)
            _check_encodings(where, op, rounded, self.roles.encodable)
            if op.stage is not None and op.stage.kind is StageKind.NORM:
                for addend in self.roles.addends:
                    if addend in state and addend not in op.reads:
                        raise PlanError(f"{where} would lose {addend}, which no op has added to {self.roles.stream}")
            if op.kind is OpKind.ADD:
                state.pop(op.reads[1])
            state |= zip(op.writes, op.writes_at, strict=True)
            if op.stage is not None:
                for name in op.stage.frees:
                    state.pop(name, None)

    def _check(self, where: str, state: dict[str, Layout], name: str, wanted: Layout, op: Op) -> None:
        if name not in state:
            raise PlanError(f"{where} reads {name}, which no op has left")
        have = state[name]
        if have != wanted:
            owed = "its sum is still owed: it is" if have.owes_sum else "it is"
            raise PlanError(f"{where} reads {name} at {wanted}, but {owed} at {have}")
        moved = op.move is not None and (op.stage is None or name == op.reads[0])
        if op.move is not None and moved and have != op.move.src:
            raise PlanError(f"{where} moves {name} from {op.move.src}, but it is at {have}")
        if op.kind is OpKind.ADD and name == op.reads[1]:
            at = scattered(self.mesh) if op.joins else op.layout
            if have != at:
                raise PlanError(f"{where} reads {name} at {have}, where it would not be added once: it needs {at}")
        if op.stage is None or (moved and op.leaves.is_whole):
            return
        if have.owes_sum:
            raise PlanError(f"{where} reads {name} at {have}: its sum is still owed")
        if op.stage.accepts is not None and have != op.stage.accepts:
            raise PlanError(f"{where} reads {name} at {have}, but accepts only {op.stage.accepts}")
        at = op.layout if op.move is None else op.leaves
        if op.stage.accepts is None and not (have.is_whole and have == at):
            raise PlanError(f"{where} is a row stage but reads {name} at {have}: it needs whole rows in one layout")


def _check_rows(where: str, op: Op, selected: bool, state: dict[str, Layout]) -> bool:
    """Whether only the rows whose logits are requested are left after ``op``; ``selected``: before it."""
    if op.kind is OpKind.SELECT:
        left = sorted(set(state) - set(op.reads))
        if selected or left:
            why = "they have been selected before" if selected else f"{', '.join(left)} would keep all of them"
            raise PlanError(f"{where} selects rows, but {why}")
        return True
    if selected is not (op.row_set is RowSet.LOGITS):
        have, says = ("the rows with logits", "all rows") if selected else ("all rows", "the rows with logits")
        raise PlanError(f"{where} is an op on {says}, but there are {have}")
    if op.stage is not None and not (op.stage.after_selection if selected else op.stage.row_set is RowSet.ALL):
        needs = "all rows, but only those with logits are left" if selected else "the rows with logits alone"
        raise PlanError(f"{where} needs {needs}")
    return selected


def _check_encodings(where: str, op: Op, rounded: dict[str, Encoding], encodable: frozenset[str]) -> None:
    """``rounded``: the fields whose rows have been encoded on their way to where they are; kept up to date."""
    if op.encodings and (op.move is None or op.move.kind is not MoveKind.ALL_GATHER):
        raise PlanError(f"{where} encodes rows, but only an all_gather may: sums are of whole values")
    if op.encodings and len(op.encodings) != len(op.reads):
        raise PlanError(f"{where} has {len(op.encodings)} encodings for {len(op.reads)} fields")
    for name, encoding in op.encoded.items():
        if name not in encodable:
            may = ", ".join(sorted(encodable))
            raise PlanError(f"{where} would send {name} as {encoding}; only {may} may be encoded")
        rounded[name] = encoding
    is_norm = op.stage is not None and op.stage.kind is StageKind.NORM
    for name in op.reads:
        if name in rounded and (is_norm or op.kind is OpKind.ADD):
            raise PlanError(f"{where} would add {name}, whose rows came as {rounded[name]}, to the residual stream")
    if op.stage is not None:
        for name in op.writes:
            rounded.pop(name, None)
