"""Plans in words: what a plan does, how two plans differ, and why `auto` is the one that it is.

Every word comes from the ops, their layouts, rows and prices. There is no text for any particular named layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from narrows.arch.stages import PriceClass, StageKind
from narrows.layout import Algorithm, Encoding, Layout, Mesh, MoveKind
from narrows.plan.plan import Op, OpKind, Plan, Segment

__all__ = [
    "Comparison",
    "compare",
    "describe",
    "fields_words",
    "into_words",
    "layout_words",
    "main_segment",
    "move_words",
    "op_words",
    "segment_difference",
    "why",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Predicted seconds of plans side by side: one entry per plan, in the order of ``names``, in every tuple.

    ``ratios`` are totals divided by the smallest one.
    """

    names: tuple[str, ...]
    seconds: dict[PriceClass, tuple[float, ...]]
    totals: tuple[float, ...]
    ratios: tuple[float, ...]


def compare(plans: Sequence[Plan]) -> Comparison:
    """The totals of ``plans`` by price class, in the order of :class:`PriceClass`."""
    totals = [plan.totals() for plan in plans]
    best = min(plan.ps for plan in plans)
    return Comparison(
        names=tuple(plan.layout_name for plan in plans),
        seconds={price_class: tuple(total[price_class] for total in totals) for price_class in PriceClass},
        totals=tuple(plan.seconds for plan in plans),
        ratios=tuple(plan.ps / best if best else 1.0 for plan in plans),
    )


# -- words for parts of a plan -----------------------------------------------------------------------------------------


def layout_words(mesh: Mesh, layout: Layout) -> str:
    """FULL, GROUP or SCATTERED, or the placements of a layout that has no such title."""
    return layout.title(mesh) or str(layout)


def fields_words(
    bundle_of: Mapping[str, str], fields: tuple[str, ...], encoded: Mapping[str, Encoding] = MappingProxyType({})
) -> str:
    """Names of fields as they are printed; those that always go together, as one.

    >>> fields_words({"x": "x", "gate_ids": "gate", "gates": "gate"}, ("x", "gate_ids", "gates"), {"x": Encoding.INT8})
    'x int8, gate'
    """
    words = (f"{bundle_of[name]} {encoded[name]}" if name in encoded else bundle_of[name] for name in fields)
    return ", ".join(dict.fromkeys(words))


def move_words(plan: Plan, op: Op) -> str:
    """A move in a few words: what it is, over which axes if there are several, and of what unless the plain stream."""
    words = _kind_words(op)
    if plan.roles.stream in op.reads and not op.encoded:
        return words
    return f"{words} of {fields_words(plan.roles.bundle_of, op.reads, op.encoded)}"


def _kind_words(op: Op) -> str:
    assert op.move is not None
    words = op.name.replace("_norm", " and norm in one").replace("_", "-")
    if op.move.algorithm is not Algorithm.FLAT:
        words = f"{op.move.algorithm} {words}"
    several_axes = sum(size > 1 for size in op.move.mesh.sizes) > 1
    return f"{words} over {op.move.axes}" if several_axes else words


def main_segment(plan: Plan) -> Segment:
    """The segment that runs in most layers."""
    return max(plan.segments, key=lambda segment: len(segment.layers))


def describe(plan: Plan) -> str:
    """How rows travel in most layers: the moves into each stage whose weights are sharded, such as
    ``reduce-scatter + all-gather of qkv_latent into attention; all-reduce into experts``."""
    by_target = _moves_by_target(main_segment(plan).ops)
    return "; ".join(f"{_moves_words(plan, moves) or 'no move'} into {target}" for target, moves in by_target.items())


def into_words(plan: Plan, target: str) -> str:
    """The moves into the sharded stage ``target`` in most layers; empty if there is none, or no such stage."""
    return _moves_words(plan, _moves_by_target(main_segment(plan).ops).get(target, []))


def _moves_by_target(ops: Sequence[Op]) -> dict[str, list[Op]]:
    """Moves that cost something by the sharded stage that they lead to: a boundary may be crossed by several ops."""
    by_target: dict[str, list[Op]] = {}
    moves: list[Op] = []
    for op in ops:
        if op.move is not None:
            moves.append(op)
        elif _is_target(op):
            by_target[op.name] = [move for move in moves if not _is_free(move)]
            moves = []
    return by_target


def _is_target(op: Op) -> bool:
    return op.stage is not None and op.stage.kind is StageKind.SHARDED and not op.leaves.holds_columns


def _is_free(op: Op) -> bool:
    return op.move is not None and op.move.kind is MoveKind.SLICE


def _moves_words(plan: Plan, ops: Sequence[Op]) -> str:
    return " + ".join(move_words(plan, op) for op in ops)


def op_words(plan: Plan, op: Op) -> str:
    """An op in a few words, to describe how one layer differs from another."""
    fields = fields_words(plan.roles.bundle_of, op.reads, op.encoded)
    if op.move is not None:
        return f"{_kind_words(op)} of {fields} to {layout_words(plan.mesh, op.leaves)}"
    at = layout_words(plan.mesh, op.layout)
    if op.kind is OpKind.STAGE:
        return f"{op.name} of {fields} at {at}"
    return f"{op.name} before {op.boundary} at {at}"


def segment_difference(plan: Plan, usual: Segment, odd: Segment) -> str:
    """How the ops of ``odd`` differ from those of ``usual``. That those after ``select_rows`` have fewer rows is that
    op's line."""

    def what(op: Op) -> tuple[object, ...]:
        return (
            op.kind,
            op.name,
            op.boundary,
            op.reads,
            op.reads_at,
            op.writes_at,
            op.encodings,
            op.move.algorithm if op.move is not None else None,
        )

    here, there = {what(op): op for op in odd.ops}, {what(op): op for op in usual.ops}
    changes = [f"without {op_words(plan, there[key])}" for key in there if key not in here]
    changes += [f"with {op_words(plan, here[key])}" for key in here if key not in there]
    return "; ".join(changes)


# -- why ---------------------------------------------------------------------------------------------------------------

_WORTH_A_CLAUSE = 0.03
"""Share of all differences, added up without their signs, below which a price class is not mentioned."""
_MOST_CAUSES = 2
"""Causes mentioned per price class, the largest ones."""
_WORTH_A_CAUSE = 0.1
"""Share of the differences within a class below which a cause is not mentioned."""
_SAME = 0.05
"""A cause this near its class's difference is given as the whole of it."""


def why(auto: Plan, other: Plan) -> str:
    """Where ``other`` costs more than ``auto`` and where less, and which stages and moves make it so.

    One sentence, such as ``attn-tp-input-scattered costs 2.4 % more (+42.2 ms): router at FULL (32768 rows of the
    largest rank) instead of SCATTERED (4096) (+44.8 ms); communication -38.0 ms (...)``. Both are plans of one step.
    """
    name, more = other.layout_name, other.ps - auto.ps
    if more == 0 and auto.signature() == other.signature():
        return f"{auto.layout_name} is {name}: the same ops at the same cost"
    if more == 0:
        return f"{name} costs the same as {auto.layout_name}, by other ops"
    percent = 100 * abs(more) / auto.ps
    head = f"{name} costs {percent:.1f} % {'more' if more > 0 else 'less'} ({_ms(more)})"
    clauses = _clauses(auto, other)
    return f"{head}: {'; '.join(clauses)}" if clauses else head


def _clauses(auto: Plan, other: Plan) -> list[str]:
    """One clause per price class that matters: those where ``other`` costs more first, the largest first."""
    causes = _causes(auto, other)
    totals = {price_class: sum(by_words.values()) for price_class, by_words in causes.items()}
    everything = sum(abs(ps) for ps in totals.values())
    clauses, told_rows = [], False
    for price_class, total in sorted(totals.items(), key=lambda item: -item[1]):
        if abs(total) < _WORTH_A_CLAUSE * everything or total == 0:
            continue
        by_words = causes[price_class]
        size = sum(abs(ps) for ps in by_words.values())
        large = {words: ps for words, ps in by_words.items() if abs(ps) >= _WORTH_A_CAUSE * size}
        ordered = sorted(large.items(), key=lambda item: -abs(item[1]))[:_MOST_CAUSES]
        if len(ordered) == 1 and abs(ordered[0][1] - total) <= _SAME * abs(total):
            text = f"{ordered[0][0]} ({_ms(total)})"
        else:
            text = f"{price_class} {_ms(total)} ({', '.join(f'{words} {_ms(ps)}' for words, ps in ordered)})"
        if not told_rows and " rows" in text:
            text, told_rows = text.replace(" rows", " rows of the largest rank", 1), True
        clauses.append(text)
    return clauses


def _causes(auto: Plan, other: Plan) -> dict[PriceClass, dict[str, int]]:
    """Picoseconds that ``other`` costs more, by price class and by words for what differs, over all layers."""
    causes: dict[PriceClass, dict[str, int]] = {}
    positions = {id(segment): _by_position(segment) for plan in (auto, other) for segment in plan.segments}
    # Few pairs of segments meet in 61 layers: each pair is compared once, and counted as often as it occurs.
    pairs = Counter((id(a), id(b)) for a, b in zip(_per_layer(auto), _per_layer(other), strict=True))
    for (mine_id, its_id), times in pairs.items():
        ours, theirs = positions[mine_id], positions[its_id]
        for position in {**theirs, **ours}:
            mine, its = ours.get(position, []), theirs.get(position, [])
            more = sum(op.ps for op in its) - sum(op.ps for op in mine)
            if more:
                price_class, target = position
                words = _difference(auto, mine, its, target)
                by_words = causes.setdefault(price_class, {})
                by_words[words] = by_words.get(words, 0) + more * times
    return causes


def _per_layer(plan: Plan) -> Iterator[Segment]:
    for segment in plan.segments:
        yield from [segment] * segment.times


Position = tuple[PriceClass, str]
"""A price class, and the stage that an op is, or that it leads to."""


def _by_position(segment: Segment) -> dict[Position, list[Op]]:
    positions: dict[Position, list[Op]] = {}
    waiting: list[Op] = []
    for op in segment.ops:
        if op.move is not None:
            waiting.append(op)
            continue
        positions.setdefault((op.price_class, op.boundary), []).append(op)
        if _is_target(op):
            positions.setdefault((PriceClass.COMMUNICATION, op.name), []).extend(waiting)
            waiting = []
    return positions


def _difference(plan: Plan, mine: Sequence[Op], its: Sequence[Op], target: str) -> str:
    """What the other plan does at a position, and what auto does instead."""
    some = (its or mine)[0]
    if some.stage is None:
        there = _moves_words(plan, [op for op in mine if op.move and not _is_free(op)])
        here = _moves_words(plan, [op for op in its if op.move and not _is_free(op)])
        where = f"into {target}"
        if some.move is None:
            here, there, where = _added(its), _added(mine), f"before {target}"
        if not here or not there:
            return f"{'with' if here else 'without'} {here or there} {where}"
        if here == there:
            return f"{here} {where}, {_megabytes(its)} instead of {_megabytes(mine)}"
        return f"{here} instead of {there} {where}"
    if some.stage.kind is StageKind.NORM and not (mine and its):
        return f"{'with' if its else 'without'} {some.name} as an op of its own"
    if not mine or not its:
        return f"{some.name}, which auto does not run" if its else f"no {some.name}, which auto runs"
    its_op, my_op = its[0], mine[0]
    if its_op.rows != my_op.rows:
        at, instead = layout_words(plan.mesh, its_op.layout), layout_words(plan.mesh, my_op.layout)
        if at == instead:
            return f"{some.name} on {its_op.rows} rows instead of {my_op.rows}"
        return f"{some.name} at {at} ({its_op.rows} rows) instead of {instead} ({my_op.rows})"
    if its_op.fused != my_op.fused:
        return f"{some.name} {'with' if its_op.fused else 'without'} the add of the residual"
    return f"{some.name} on equal rows, its weights sharded otherwise"


def _added(ops: Sequence[Op]) -> str:
    return " + ".join(f"{op.name.replace('_', ' ')} on {op.rows} rows" for op in ops)


def _megabytes(ops: Sequence[Op]) -> str:
    return f"{sum(op.nbytes for op in ops) / 1e6:.3g} MB"


def _ms(ps: int) -> str:
    """A difference in milliseconds, signed, in microseconds where it is small.

    >>> _ms(42_200_000_000), _ms(-950_000)
    ('+42.2 ms', '-0.95 us')
    """
    return f"{ps / 1e9:+.1f} ms" if abs(ps) >= 10**9 else f"{ps / 1e6:+.3g} us"
