"""Prices from what was measured on one machine: stages by rows, collectives by bytes and group, copies.

The tables are those of a profile (docs/profiles.md): these classes are read from it, priced by, and written to it.
A stage is looked up by what it computes (its price class and work), so a table made with one model serves every model
whose ranks do the same work. What was not measured is priced by its nearest neighbour's share of the roofline, and says
`scaled`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, astuple, dataclass, fields
from functools import cached_property
from statistics import median
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Norm, PriceClass, Stream, Work
from narrows.cost.price import Curve, Price, Source
from narrows.layout import Algorithm

__all__ = [
    "AXES",
    "COLLECTIVES",
    "DTYPES",
    "MEASURED_OPS",
    "REDUCE_NORM",
    "WORKS",
    "CollectiveTable",
    "Measured",
    "ProfileObject",
    "SizeRow",
    "StageTable",
    "StepTable",
]

DTYPES = ("bf16", "fp8", "int8", "int8-weight-only", "stored", "fp32")
"""Types of the linear weights and their GEMMs; activations are 2 bytes wide, 4 with fp32."""

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
"""The operations that have a price on every device."""

AXES = ("inner", "outer")
"""Of a group's ranks: next to each other (along the last axes of a mesh), or apart with other groups between them."""

REDUCE_NORM = "all_reduce_norm"
"""An all-reduce and the norm of its rows as one step; its bytes are those of the all-reduce."""

MEASURED_OPS = (*COLLECTIVES, "column_gather", REDUCE_NORM)
WORKS: Mapping[str, type[Work]] = {
    "gemm": Gemm,
    "grouped_gemm": GroupedGemm,
    "norm": Norm,
    "stream": Stream,
    "attention": AttentionCore,
}
_NAMES = {kind: name for name, kind in WORKS.items()}

_Table = TypeVar("_Table")
_Point = TypeVar("_Point")

Point = tuple[float, float]
"""(size, seconds)."""


# -- the tables --------------------------------------------------------------------------------------------------------


class ProfileObject(BaseModel):
    """A part of a profile. An unknown field is an error: a misspelt one would leave a price to the roofline unsaid."""

    model_config = ConfigDict(
        strict=True,
        defer_build=True,  # most processes read no profile
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
    )

    @field_validator("points", "copies", check_fields=False)
    @classmethod
    def _real_points(cls, rows: list[list[float]]) -> list[list[float]]:
        seen: set[tuple[float, ...]] = set()
        for row in rows:
            if not (row[0] and row[1]):
                raise ValueError(f"the point {row} has a size or a time of 0")
            at = (row[0], *row[3:])
            if at in seen:
                raise ValueError(f"there are two points at {' and '.join(f'{x:g}' for x in at)}")
            seen.add(at)
        return rows


def short(number: float) -> float:
    """A whole number without its point, for files that people read."""
    return int(number) if number == int(number) else number


def _row(row: Sequence[float]) -> list[float]:
    """A row as it is written: microseconds and spread to three decimals."""
    return [short(row[0]), *(round(x, 3) for x in row[1:3]), *map(short, row[3:])]


def _document(item: object) -> object:
    """An item of work as a profile has it: its fields, and which kind it is."""
    if type(item) not in _NAMES:
        return item
    values = {name: short(x) if isinstance(x, float) else x for name, x in asdict(item).items()}  # type: ignore[call-overload]
    return {"kind": _NAMES[type(item)], **values}  # type: ignore[index]


def _item(name: str, kind: type[Work]) -> Any:
    """The document of one item of work: the fields of its class, and ``kind``."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {"kind": (Literal[name], ...)}
    for each in fields(kind):
        is_size = hints[each.name] in (int, float)
        hint = Annotated[hints[each.name], Field(ge=0)] if is_size else hints[each.name]
        given[each.name] = (hint, ... if each.default is MISSING else each.default)
    return create_model(name, __base__=ProfileObject, **given)


_Item: Any = (
    _item("gemm", Gemm)
    | _item("grouped_gemm", GroupedGemm)
    | _item("norm", Norm)
    | _item("stream", Stream)
    | _item("attention", AttentionCore)
)
_Work: Any = Annotated[
    Annotated[_Item, Field(discriminator="kind")],
    BeforeValidator(_document),
    AfterValidator(lambda item: WORKS[item.kind](**item.model_dump(exclude={"kind"}))),
    PlainSerializer(_document),
]
_Phase: Any = Literal["decode", "prefill"]
_Number = Annotated[float, Field(ge=0)]
_StageRow = Annotated[list[_Number], Field(min_length=2, max_length=4), PlainSerializer(_row, return_type=Any)]
SizeRow = Annotated[list[_Number], Field(min_length=2, max_length=3), PlainSerializer(_row, return_type=Any)]
"""[size, us, spread]; the last may be left out."""
_SizeRows = Annotated[list[SizeRow], Field(min_length=2)]


class StageTable(ProfileObject):
    """Microseconds of one stage: what it computes on the largest rank, in which dtype, and the points.

    ``phase``: of which steps; None: of all. Steps of few rows cost less in decode, where they are replayed; attention
    may run in another form. ``points``: [rows, us, spread, attended]; the last two may be left out. ``rows`` are the
    largest rank's; below 1: of the mean rank, where some have none (see :meth:`RowSplit.at_work`). ``spread``: how far
    p90 lies above p10, as a share of the median. ``attended``: tokens of context that a row attends to, on average.
    """

    stage: PriceClass
    dtype: Literal[DTYPES]  # type: ignore[valid-type]
    phase: _Phase | None = None
    work: Annotated[list[_Work], Field(min_length=1)]
    points: Annotated[list[_StageRow], Field(min_length=1)]

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """The work as the chain of a model states it."""
        return tuple(self.work)


class CollectiveTable(ProfileObject):
    """Microseconds of one collective in groups of ``ranks``, over the bytes of the whole tensor. All groups of the
    world exchange at once. ``axis``: one of AXES; ``phase``: of which steps; None: of all. ``nodes``: that each group
    lies on; with one of its ranks on each where ``nodes`` is ``ranks``. ``algorithm``: how it is done there.
    ``points``: [bytes, us, spread]."""

    op: Literal[MEASURED_OPS]  # type: ignore[valid-type]
    ranks: Annotated[int, Field(ge=2)]
    axis: Literal[AXES] = AXES[0]  # type: ignore[valid-type]
    phase: _Phase | None = None
    nodes: Annotated[int, Field(ge=1)] = 1
    algorithm: Literal[tuple(map(str, Algorithm))] = str(Algorithm.FLAT)  # type: ignore[valid-type]
    points: _SizeRows

    @model_validator(mode="after")
    def _ranks_fill_nodes(self) -> CollectiveTable:
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks cannot lie on {self.nodes} nodes, equally many on each")
        return self

    @model_serializer(mode="wrap")
    def _given_fields(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = whole(self)
        usual = {"nodes": 1, "algorithm": Algorithm.FLAT}
        return {name: value for name, value in document.items() if value != usual.get(name, ...)}


class StepTable(ProfileObject):
    """Microseconds of a step outside of the run of its plan, over its rows: handing it out, its inputs, its result."""

    phase: _Phase
    points: _SizeRows


# -- prices ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """All tables of one machine. ``copies``: one pass that reads and writes, [bytes of both, us]. ``num_ranks``: the
    ranks that were at work together; 0: unknown."""

    stages: Sequence[StageTable] = ()
    collectives: Sequence[CollectiveTable] = ()
    copies: Sequence[Sequence[float]] = ()
    steps: Sequence[StepTable] = ()
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

    def collective(
        self,
        op: str,
        num_ranks: int,
        axis: str,
        nbytes: int,
        phase: str = "",
        nodes: int = 1,
        algorithm: str = Algorithm.FLAT,
    ) -> Price | None:
        """Seconds of a collective; None if it was not measured so in such groups on so many nodes."""
        curve = _of_phase(self._collectives.get((op, num_ranks, axis, nodes, algorithm), {}), phase)
        return None if curve is None else curve.at(nbytes)

    def copy(self, nbytes: float) -> Price | None:
        """Seconds of one pass over rows that reads and writes ``nbytes`` in all."""
        return None if self._copies is None else self._copies.at(nbytes)

    def step(self, phase: str, rows: int) -> Price | None:
        """Seconds of a step outside its plan."""
        curve = self._steps.get(phase)
        return None if curve is None else curve.at(max(rows, 1))

    def scatter(self, price_class: str) -> float | None:
        """How far the measurements of a class of stages, or of collectives (``communication``), lie from their median:
        half of the share by which p90 lies above p10, the median of all points. None: there are none with a spread."""
        return self._scatters.get(price_class)

    @cached_property
    def _scatters(self) -> Mapping[str, float]:
        spreads: dict[str, list[float]] = {}
        for table in self.stages:
            spreads.setdefault(table.stage, []).extend(row[2] for row in table.points if len(row) > 2 and row[2])
        spreads["communication"] = [row[2] for table in self.collectives for row in table.points if row[2:] and row[2]]
        return {price_class: median(found) / 2 for price_class, found in spreads.items() if found}

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Of the stages that were measured."""
        return tuple(dict.fromkeys(each.dtype for each in self.stages))

    @cached_property
    def _surfaces(self) -> Mapping[tuple[str, tuple[Work, ...], str], Mapping[str, _Surface]]:
        held: dict[tuple[str, tuple[Work, ...], str], dict[str, tuple[_StagePoint, ...]]] = {}
        for each in self.stages:
            points = tuple(map(_stage_point, each.points))
            held.setdefault((each.stage, each.works, each.dtype), {})[each.phase or ""] = points
        return {
            key: {phase: _Surface(points) for phase, points in _phases(tables, _rows, alike=not _attends(key[1]))}
            for key, tables in held.items()
        }

    @cached_property
    def _kinds(self) -> Mapping[tuple[str, str, tuple[object, ...]], tuple[tuple[Work, ...], ...]]:
        found: dict[tuple[str, str, tuple[object, ...]], dict[tuple[Work, ...], None]] = {}
        for each in self.stages:
            found.setdefault((each.stage, each.dtype, _kind(each.works)), {})[each.works] = None
        return {kind: tuple(works) for kind, works in found.items()}

    @cached_property
    def _single(self) -> Mapping[tuple[Work, str], str]:
        return {(each.works[0], each.dtype): each.stage for each in self.stages if len(each.works) == 1}

    @cached_property
    def _collectives(self) -> Mapping[tuple[str, int, str, int, str], Mapping[str, Curve]]:
        held: dict[tuple[str, int, str, int, str], dict[str, tuple[Point, ...]]] = {}
        for each in self.collectives:
            key = each.op, each.ranks, each.axis, each.nodes, each.algorithm
            held.setdefault(key, {})[each.phase or ""] = _points(each.points)
        return {
            key: {phase: Curve.of(points) for phase, points in _phases(tables, _size, alike=True)}
            for key, tables in held.items()
        }

    @cached_property
    def _copies(self) -> Curve | None:
        return Curve.of(_points(self.copies)) if self.copies else None

    @cached_property
    def _steps(self) -> Mapping[str, Curve]:
        return {each.phase: Curve.of(_points(each.points)) for each in self.steps}


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


def _points(rows: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    """[size, us, ...] in seconds."""
    return tuple((row[0], row[1] / 1e6) for row in rows)


def _size(point: Point) -> float:
    return point[0]


_StagePoint = tuple[float, float, float]
"""(rows, attended, seconds)."""


def _stage_point(row: Sequence[float]) -> _StagePoint:
    return row[0], row[3] if len(row) == 4 else 0.0, row[1] / 1e6


def _rows(point: _StagePoint) -> float:
    return point[0]


class _Surface:
    """Seconds over rows and attended tokens: a straight line in what is attended, log-log in rows."""

    def __init__(self, points: Iterable[_StagePoint]) -> None:
        by_rows: dict[float, list[tuple[float, float]]] = {}
        for rows, attended, seconds in points:
            by_rows.setdefault(rows, []).append((attended, seconds))
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
