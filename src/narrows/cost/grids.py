"""Measured GPU kernel times over several sizes, interpolated in log space.

The tables are ``data/gpu.zip``, one member per device and kernel, read when it is first needed
(``benchmarks/price_tables/build.py`` makes them).
"""

from __future__ import annotations

import io
import math
import pkgutil
import zipfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType

from narrows.cost.price import Curve, Price, Source

__all__ = ["Grid", "grids"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Seconds over ``(*keys, size)``: for each combination of key values a curve over sizes, some of them missing."""

    axes: tuple[tuple[int, ...], ...]
    """The values of each key, ascending."""
    curves: Mapping[tuple[int, ...], Curve]

    @classmethod
    def of(cls, curves: Mapping[tuple[int, ...], Curve]) -> Grid:
        """The grid of these curves, by key values."""
        count = len(next(iter(curves)))
        return cls(tuple(tuple(sorted({key[i] for key in curves})) for i in range(count)), MappingProxyType(curves))

    def within(self, key: Sequence[float]) -> tuple[float, ...]:
        """``key`` moved into the range of the axes: the nearest point at which the grid speaks for itself."""
        return tuple(min(max(value, axis[0]), axis[-1]) for value, axis in zip(key, self.axes, strict=True))

    def at(self, key: Sequence[float], size: float) -> Price:
        """Seconds at ``key`` (within the axes) and ``size``.

        At a point of the table the point, measured. Between points the weighted mean of the logarithms at the corners
        of the cell, interpolated; a corner that was not measured leaves its weight to the others. The size behaves as
        in :meth:`Curve.at`: below the first the first, above the last on along the last segment.
        """
        sides = [_side(axis, value) for axis, value in zip(self.axes, key, strict=True)]
        total, weights, source = 0.0, 0.0, Source.MEASURED
        for corner in product(*sides):
            curve = self.curves.get(tuple(value for value, _ in corner))
            weight = math.prod(share for _, share in corner)
            if curve is None or not weight:
                continue
            price = curve.at(size)
            total += weight * math.log(price.seconds)
            weights += weight
            source = max(source, price.source)
        if not weights:
            nearest = min(self.curves, key=lambda known: _distance(known, key))
            return Price(self.curves[nearest].at(size).seconds, Source.SCALED)
        if weights < 1 or any(len(side) > 1 for side in sides):
            source = max(source, Source.INTERPOLATED)
        return Price(math.exp(total / weights), source)


def grids(device: str, kernel: str) -> Mapping[tuple[str, ...], Grid]:
    """The measured times of ``kernel`` on ``device``, by the keys that are names (dtypes, models, routings).

    Empty where none were measured. The grids' keys are the numbers among the keys, in the order of the columns."""
    return _grids(device, kernel)


@cache
def _grids(device: str, kernel: str) -> Mapping[tuple[str, ...], Grid]:
    try:
        text = _archive().read(f"{device}/{kernel}.csv").decode("ascii")
    except KeyError:
        return MappingProxyType({})
    header, *lines = text.split()
    columns = header.split(",")
    first = next(i for i, name in enumerate(columns) if name.isdigit())
    sizes = [float(size) for size in columns[first:]]
    found: dict[tuple[str, ...], dict[tuple[int, ...], Curve]] = {}
    for line in lines:
        cells = line.split(",")
        names = tuple(cell for cell in cells[:first] if not cell.isdigit())
        numbers = tuple(int(cell) for cell in cells[:first] if cell.isdigit())
        points = [(size, float(us) * 1e-6) for size, us in zip(sizes, cells[first:], strict=True) if us]
        if len(points) > 1:
            found.setdefault(names, {})[numbers] = Curve.of(points)
    return MappingProxyType({names: Grid.of(curves) for names, curves in found.items()})


@cache
def _archive() -> zipfile.ZipFile:
    data = pkgutil.get_data(__package__, "data/gpu.zip")
    assert data is not None, "data/gpu.zip is missing from the package"
    return zipfile.ZipFile(io.BytesIO(data))


def _side(axis: tuple[int, ...], value: float) -> tuple[tuple[int, float], ...]:
    """The neighbours of ``value`` on an axis, with the weight of each."""
    i = bisect_left(axis, value)
    if i < len(axis) and axis[i] == value:
        return ((axis[i], 1.0),)
    low, high = axis[i - 1], axis[i]
    share = math.log(value / low) / math.log(high / low)
    return (low, 1.0 - share), (high, share)


def _distance(known: tuple[int, ...], key: Sequence[float]) -> float:
    return math.hypot(*(math.log(a / b) for a, b in zip(known, key, strict=True)))
