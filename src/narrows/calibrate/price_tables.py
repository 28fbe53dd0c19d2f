"""What a calibration has found, as it is found, and the tables of a profile that it makes.

A collective that was measured alone is scaled by what others of its size cost in a plan against alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from narrows.arch.stages import AttentionCore, PriceClass, Work
from narrows.calibrate.statistics import quantile, spread
from narrows.cost.measured import AXES, REDUCE_NORM, CollectiveTable, Measured, StageTable, StepTable
from narrows.layout import Algorithm, Mesh, Move, MoveKind, Topology
from narrows.plan.plan import Op, OpKind, Plan

__all__ = ["OPS", "Among", "Calibration", "Tables", "axis_of"]

OPS = {
    MoveKind.ALL_REDUCE: "all_reduce",
    MoveKind.REDUCE_SCATTER: "reduce_scatter",
    MoveKind.ALL_GATHER: "all_gather",
    MoveKind.COLUMN_GATHER: "column_gather",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The tables, and the rates that price what they lack: per rank, with all ranks at work."""

    measured: Measured
    read_bytes_per_s: float
    flop_per_s: float
    seconds: float
    left_out: tuple[str, ...]


class Among(NamedTuple):
    """A collective, and the groups that make it: their ranks, whether these lie next to each other, on how many hosts,
    and how they do it there."""

    op: str
    ranks: int
    axis: str
    nodes: int = 1
    algorithm: str = str(Algorithm.FLAT)

    @classmethod
    def of(
        cls,
        op: str,
        mesh: Mesh,
        axes: tuple[int, int],
        topology: Topology,
        algorithm: Algorithm = Algorithm.FLAT,
    ) -> Among:
        """Along these axes of a mesh, first and one past the last."""
        levels = topology.levels_along(mesh, *axes)[0]
        return cls(op, levels.num_ranks, axis_of(mesh, axes[1]), levels.num_nodes, str(algorithm))


class Tables:
    """Seconds as they are found, by what a price is looked up by. ``num_nodes``: hosts that all ranks lie on."""

    def __init__(self, num_nodes: int = 1) -> None:
        self.num_nodes = num_nodes
        self.stages: dict[tuple[PriceClass, tuple[Work, ...], str, str], dict[tuple[float, float], list[float]]] = {}
        self.moves: dict[str, dict[Among, dict[int, list[float]]]] = {}
        """By phase."""
        self.alone: dict[Among, dict[int, list[float]]] = {}
        self.copies: dict[int, list[float]] = {}
        self.steps: dict[str, dict[int, list[float]]] = {}
        self.rates: list[tuple[float, float]] = []
        self.left_out: dict[str, None] = {}
        self.dtype = "bf16"

    def add_execution(self, plan: Plan, seconds: Sequence[float]) -> None:
        """What the ops of one run of ``plan`` took, layers of a kind averaged."""
        found: dict[int, tuple[Op, list[float]]] = {}
        for (_, op), taken in zip(plan.ops(), seconds, strict=True):
            found.setdefault(id(op), (op, []))[1].append(taken)
        for op, taken_s in found.values():
            mean = sum(taken_s) / len(taken_s)
            if op.move is not None and op.is_collective and op.nbytes:
                collective = OPS[op.move.kind] if op.stage is None else REDUCE_NORM
                self._book_move(collective, op.move, plan.shape.phase, op.nbytes, mean)
            elif op.move is None and op.stage is not None and op.rows:
                self._book_stage(op, plan, mean)

    def topology(self, mesh: Mesh) -> Topology:
        """How the ranks of a mesh lie on the hosts."""
        return Topology(self.num_nodes, mesh.size // self.num_nodes)

    def _book_stage(self, op: Op, plan: Plan, seconds: float) -> None:
        stage, shape = op.stage, plan.shape
        assert stage is not None and op.kind is OpKind.STAGE
        work = stage.plain_work if stage.plain_work and not op.fused else stage.work
        attends = any(isinstance(item, AttentionCore) for item in work)
        attended = shape.attended(op.rows, stage.window) if attends else 0.0
        table = self.stages.setdefault((stage.price_class, work, self.dtype, shape.phase), {})
        table.setdefault((shape.split(op.row_set).at_work(op.layout), attended), []).append(seconds)

    def _book_move(self, collective: str, move: Move, phase: str, nbytes: int, seconds: float) -> None:
        along = move.first, move.last
        key = Among.of(collective, move.mesh, along, self.topology(move.mesh), move.algorithm)
        self.moves.setdefault(phase, {}).setdefault(key, {}).setdefault(nbytes, []).append(seconds)

    def calibration(self, seconds: float) -> Calibration:
        """Everything measured, as tables."""
        measured = Measured(
            stages=tuple(self._stages()),
            collectives=tuple(self._collectives()),
            copies=_rows(self.copies),
            steps=tuple(StepTable(phase=phase, points=_rows(table)) for phase, table in self.steps.items()),
        )
        return Calibration(
            measured=measured,
            read_bytes_per_s=max((read for read, _ in self.rates)),
            flop_per_s=max((flop for _, flop in self.rates)),
            seconds=seconds,
            left_out=tuple(self.left_out),
        )

    def _stages(self) -> Iterator[StageTable]:
        for (price_class, work, dtype, phase), found in self.stages.items():
            attends = any(attended for _, attended in found)
            points = [
                [rows, *_figures(found[rows, attended]), *([attended] if attends else [])]
                for rows, attended in sorted(found)
            ]
            yield StageTable(stage=price_class, work=list(work), dtype=dtype, phase=phase, points=points)

    def _collectives(self) -> Iterator[CollectiveTable]:
        """Each as it was in a plan that has it at its size, else its time alone times the factor at that size."""
        for phase, moves in self.moves.items():
            added = _added(moves, self.alone)
            for key in dict.fromkeys((*self.alone, *moves)):
                alone = self.alone.get(key, {})
                table = {nbytes: [s * added(nbytes) for s in seconds] for nbytes, seconds in alone.items()}
                if executions := moves.get(key):
                    executions = _merged(executions)
                    least, most = min(executions), max(executions)
                    table = {n: s for n, s in table.items() if n < least / 1.5 or n > most * 1.5} | executions
                if len(table) < 2:
                    continue
                yield CollectiveTable(**key._asdict(), phase=phase, points=_rows(table))


def _merged(table: dict[int, list[float]]) -> dict[int, list[float]]:
    """Sizes that lie within a fifth of each other as one, at their mean: what differs there is the plan."""
    merged: dict[int, list[float]] = {}
    together: list[int] = []
    for nbytes in [*sorted(table), 1 << 62]:
        if together and nbytes > 1.2 * together[0]:
            merged[round(sum(together) / len(together))] = [s for n in together for s in table[n]]
            together = []
        together.append(nbytes)
    return merged


def _added(
    moves: dict[Among, dict[int, list[float]]], alone: dict[Among, dict[int, list[float]]]
) -> Callable[[float], float]:
    """By what factor a collective of so many bytes takes longer in a plan than alone: the median of all those that
    were seen both ways at about that size, at least 1."""
    ratios: dict[int, list[float]] = {}
    for key, table in moves.items():
        for nbytes, seconds in table.items():
            near = min(alone.get(key, ()), key=lambda other: abs(other - nbytes), default=None)
            if near is not None and 0.6 < near / nbytes < 1.7:
                ratio = quantile(seconds, 0.5) / quantile(alone[key][near], 0.5)
                ratios.setdefault(nbytes.bit_length() // 2, []).append(ratio)

    def factor(nbytes: float) -> float:
        if not ratios:
            return 1.0
        nearest = min(ratios, key=lambda size: abs(size - int(nbytes).bit_length() // 2))
        return max(quantile(ratios[nearest], 0.5), 1.0)

    return factor


def _rows(found: dict[int, list[float]]) -> list[list[float]]:
    """[size, us, spread] of each size."""
    return [[size, *_figures(found[size])] for size in sorted(found)]


def _figures(seconds: list[float]) -> tuple[float, float]:
    """Microseconds, and how far p90 lies above p10 as a share of them."""
    found = spread(seconds)
    return 1e6 * found.median, (found.p90 - found.p10) / found.median


def axis_of(mesh: Mesh, last: int) -> str:
    """Whether ranks along axes up to ``last`` lie next to each other."""
    return AXES[0] if prod(mesh.sizes[last:]) == 1 else AXES[1]
