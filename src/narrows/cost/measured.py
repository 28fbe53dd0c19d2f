"""What was measured on one machine, and the price that follows: stages by rows, collectives by bytes and group, copies.

Knows works, row counts and bytes as keys and curves; not how they were measured, nor the machine. A stage is looked up
by what it computes (its price class and work), so a table made with one model serves every model whose ranks do the
same work. What was not measured is priced by its nearest neighbour's share of the roofline, and says `scaled`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import TypeVar

from narrows.arch.stages import AttentionCore, Work
from narrows.cost.price import Price, Source
from narrows.cost.tables import Curve

__all__ = ["AXES", "REDUCE_NORM", "CollectivePoints", "Measured", "StagePoint", "StagePoints", "StepPoints"]

AXES = ("inner", "outer")
"""Of a group's ranks: next to each other (along the last axes of a mesh), or apart with other groups between them."""

REDUCE_NORM = "all_reduce_norm"
"""An all-reduce and the norm of its rows as one step; its bytes are those of the all-reduce."""

_Table = TypeVar("_Table")
_Point = TypeVar("_Point")

Points = tuple[tuple[float, float], ...]
"""(size, seconds) in ascending order of size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePoint:
    """Seconds of a stage over ``rows`` of the largest rank; below 1: of the mean rank, where some have none (see
    :meth:`RowSplit.at_work`). ``attended``: tokens of context that a row attends to, on average; 0 where
    the stage does not attend. ``spread``: how far p90 lies above p10, as a share of the median."""

    rows: float
    seconds: float
    attended: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePoints:
    """One stage: what it computes on the largest rank, in which dtype, and the points. ``phase``: of which steps;
    empty: of all. Steps of few rows cost less in decode, where they are on tape; attention may run in another form."""

    price_class: str
    work: tuple[Work, ...]
    dtype: str
    phase: str = ""
    points: tuple[StagePoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivePoints:
    """Seconds of one collective among ``num_ranks``, over the bytes of the whole tensor; ``axis`` is one of AXES. All
    groups of the world exchange at once. ``phase``: of which steps; empty: of all."""

    op: str
    num_ranks: int
    axis: str
    phase: str = ""
    points: Points
    spreads: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoints:
    """Seconds of a step outside of the walk of its plan, over its rows: handing it out, its inputs, its result."""

    phase: str
    points: Points
    spreads: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """All tables of one machine. ``copies``: one pass that reads and writes, over the bytes of both. ``num_ranks``: the
    ranks that were at work together; 0: not said."""

    stages: tuple[StagePoints, ...] = ()
    collectives: tuple[CollectivePoints, ...] = ()
    copies: Points = ()
    steps: tuple[StepPoints, ...] = ()
    num_ranks: int = 0

    def stage(
        self, price_class: str, work: tuple[Work, ...], dtype: str, rows: float, phase: str, attended: float
    ) -> Price | None:
        """Seconds of a stage of this work over ``rows`` > 0; None if its like was not measured."""
        surface = _of_phase(self._surfaces.get((price_class, work, dtype), {}), phase)
        return None if surface is None else surface.at(rows, attended if _attends(work) else 0.0)

    def nearest(self, price_class: str, work: tuple[Work, ...], dtype: str) -> tuple[Work, ...] | None:
        """The measured work of the same kind whose sizes are nearest by ratio; None if there is none of its kind."""
        kinds = self._kinds.get((price_class, dtype, _kind(work)), ())
        return min(kinds, key=lambda other: _distance(work, other), default=None)

    def item(self, item: Work, dtype: str, rows: float, phase: str, attended: float) -> Price | None:
        """Seconds of one item of work, where a stage was measured that consists of nothing else."""
        price_class = self._single.get((item, dtype))
        return None if price_class is None else self.stage(price_class, (item,), dtype, rows, phase, attended)

    def collective(self, op: str, num_ranks: int, axis: str, nbytes: int, phase: str = "") -> Price | None:
        """Seconds of a collective; None if it was not measured in such groups."""
        curve = _of_phase(self._collectives.get((op, num_ranks, axis), {}), phase)
        return None if curve is None else curve.at(nbytes)

    def copy(self, nbytes: float) -> Price | None:
        """Seconds of one pass over rows that reads and writes ``nbytes`` in all."""
        return None if self._copies is None else self._copies.at(nbytes)

    def step(self, phase: str, rows: int) -> Price | None:
        """Seconds of a step outside of the walk of its plan."""
        curve = self._steps.get(phase)
        return None if curve is None else curve.at(max(rows, 1))

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Of the stages that were measured."""
        return tuple(dict.fromkeys(each.dtype for each in self.stages))

    @cached_property
    def _surfaces(self) -> Mapping[tuple[str, tuple[Work, ...], str], Mapping[str, _Surface]]:
        held: dict[tuple[str, tuple[Work, ...], str], dict[str, tuple[StagePoint, ...]]] = {}
        for each in self.stages:
            held.setdefault((each.price_class, each.work, each.dtype), {})[each.phase] = each.points
        return {
            key: {phase: _Surface(points) for phase, points in _phases(tables, _rows, alike=not _attends(key[1]))}
            for key, tables in held.items()
        }

    @cached_property
    def _kinds(self) -> Mapping[tuple[str, str, tuple[object, ...]], tuple[tuple[Work, ...], ...]]:
        found: dict[tuple[str, str, tuple[object, ...]], dict[tuple[Work, ...], None]] = {}
        for each in self.stages:
            found.setdefault((each.price_class, each.dtype, _kind(each.work)), {})[each.work] = None
        return {kind: tuple(works) for kind, works in found.items()}

    @cached_property
    def _single(self) -> Mapping[tuple[Work, str], str]:
        return {(each.work[0], each.dtype): each.price_class for each in self.stages if len(each.work) == 1}

    @cached_property
    def _collectives(self) -> Mapping[tuple[str, int, str], Mapping[str, Curve]]:
        held: dict[tuple[str, int, str], dict[str, Points]] = {}
        for each in self.collectives:
            held.setdefault((each.op, each.num_ranks, each.axis), {})[each.phase] = each.points
        return {
            key: {phase: Curve.of(points) for phase, points in _phases(tables, _nbytes, alike=True)}
            for key, tables in held.items()
        }

    @cached_property
    def _copies(self) -> Curve | None:
        return Curve.of(self.copies) if self.copies else None

    @cached_property
    def _steps(self) -> Mapping[str, Curve]:
        return {each.phase: Curve.of(each.points) for each in self.steps}


def _of_phase(tables: Mapping[str, _Table], phase: str) -> _Table | None:
    """That of the phase, or of any."""
    return tables.get(phase, tables.get(""))


def _phases(
    tables: Mapping[str, tuple[_Point, ...]], size: Callable[[_Point], float], *, alike: bool
) -> Iterator[tuple[str, tuple[_Point, ...]]]:
    """The points by which each phase is priced. What is ``alike`` in all goes on beyond its last point by those of
    another, and is priced by another where it was not measured itself (the entry without a phase)."""
    for phase in dict.fromkeys((*tables, *([""] if alike else []))):
        points = tables.get(phase, ())
        for other in tables.values() if alike else ():
            last = max((size(point) for point in points), default=0.0)
            points += tuple(point for point in other if size(point) > last)
        yield phase, points


def _rows(point: StagePoint) -> float:
    return point.rows


def _nbytes(point: tuple[float, float]) -> float:
    return point[0]


class _Surface:
    """Seconds over rows and attended tokens: a straight line in what is attended, log-log in rows."""

    def __init__(self, points: Iterable[StagePoint]) -> None:
        by_rows: dict[float, list[tuple[float, float]]] = {}
        for point in points:
            by_rows.setdefault(point.rows, []).append((point.attended, point.seconds))
        self._rows = sorted(by_rows)
        self._lines = [sorted(by_rows[rows]) for rows in self._rows]
        assert self._rows and self._rows[0] > 0, "a stage is measured at one row or more"

    def at(self, rows: float, attended: float) -> Price:
        """At a point: measured. Between points: interpolated. Beyond them: scaled, in proportion to the rows above the
        last, as long as the first below it."""
        i = bisect_left(self._rows, rows)
        if i == len(self._rows):
            last = _along(self._lines[-1], attended)
            return Price(last.seconds * rows / self._rows[-1], Source.SCALED)
        above = _along(self._lines[i], attended)
        if self._rows[i] == rows:
            return above
        if i == 0:
            return Price(above.seconds, Source.SCALED)
        below = _along(self._lines[i - 1], attended)
        share = math.log(rows / self._rows[i - 1]) / math.log(self._rows[i] / self._rows[i - 1])
        seconds = below.seconds * (above.seconds / below.seconds) ** share
        return Price(seconds, max(Source.INTERPOLATED, below.source, above.source))


def _along(line: list[tuple[float, float]], attended: float) -> Price:
    """On the straight line through the two points around ``attended``; beyond the last two, on along their slope, but
    never below half of the least that was measured."""
    for x, seconds in line:
        if x == attended:
            return Price(seconds, Source.MEASURED)
    if len(line) == 1:
        return Price(line[0][1], Source.SCALED)
    i = min(max(bisect_left(line, (attended, 0.0)), 1), len(line) - 1)
    (x0, y0), (x1, y1) = line[i - 1], line[i]
    seconds = y0 + max(y1 - y0, 0.0) * (attended - x0) / (x1 - x0)
    inside = line[0][0] < attended < line[-1][0]
    return Price(max(seconds, min(y for _, y in line) / 2), Source.INTERPOLATED if inside else Source.SCALED)


def _attends(work: tuple[Work, ...]) -> bool:
    return any(isinstance(item, AttentionCore) for item in work)


def _kind(work: tuple[Work, ...]) -> tuple[object, ...]:
    """What works of other sizes have in common: the types of the items, and whatever of them is no number."""
    return tuple((type(item).__name__, *(x for x in astuple(item) if isinstance(x, str | bool))) for item in work)


def _distance(a: tuple[Work, ...], b: tuple[Work, ...]) -> float:
    """How far apart the sizes of two works of one kind are: the sum of the logarithms of their ratios."""
    sizes = ([x for item in work for x in astuple(item) if not isinstance(x, str | bool)] for work in (a, b))
    return sum(abs(math.log(max(x, 1e-9) / max(y, 1e-9))) for x, y in zip(*sizes, strict=True))
