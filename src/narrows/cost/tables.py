"""Measured curves: reads the CSV tables beside this file and interpolates one curve. Knows no device and no operation.

Interpolation is a straight line in log-log, because sizes and times span six decades. Fits (alpha + bytes / bandwidth)
mislead above 128 MiB. A table is read when it is first asked for, never at import.
"""

from __future__ import annotations

import math
import pkgutil
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from narrows.cost.price import Price, Source

__all__ = ["Curve", "read_rows"]

_GLITCH = 2.0
"""A point above so many times the line between its neighbours is a fault of the sweep, not a property of the machine.

Such points exist: H100 all-reduce of 1 KiB in a graph, 38 us between 3.3 and 3.5; H100 and H200 block FP8 at 2048 rows,
167 us between 31 (1024 rows) and 123 (4096 rows). Left in, they would decide plans.
"""


def read_rows(name: str, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of ``data/<name>``, one list of texts per line; the header must be exactly ``columns``."""
    data = pkgutil.get_data(__package__, f"data/{name}")
    assert data is not None, f"data/{name} is missing from the package"
    header, *lines = data.decode("ascii").split()
    assert tuple(header.split(",")) == columns, f"data/{name} has columns {header}, not {','.join(columns)}"
    return [line.split(",") for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds over one size (bytes, rows): ``xs`` strictly increasing and positive, ``ys`` positive, two or more."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """The curve through ``points`` (size, seconds) in any order, less those that are glitches of the sweep."""
        ordered = sorted(points)
        kept = [
            point
            for i, point in enumerate(ordered)
            if i in (0, len(ordered) - 1) or point[1] <= _GLITCH * _line(ordered[i - 1], ordered[i + 1], point[0])
        ]
        return cls(xs=tuple(x for x, _ in kept), ys=tuple(y for _, y in kept))

    def at(self, x: float) -> Price:
        """Seconds at size ``x``.

        At a point: the point, measured. Between two: log-log, interpolated. Below the first: the first point's time,
        scaled (latency does not shrink further). Above the last: on along the last segment, linear in ``x``, scaled.
        """
        xs, ys = self.xs, self.ys
        i = bisect_left(xs, x)
        if i == len(xs):
            slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
            return Price(ys[-1] + max(slope, 0.0) * (x - xs[-1]), Source.SCALED)
        if xs[i] == x:
            return Price(ys[i], Source.MEASURED)
        if i == 0:
            return Price(ys[0], Source.SCALED)
        return Price(_line((xs[i - 1], ys[i - 1]), (xs[i], ys[i]), x), Source.INTERPOLATED)


def _line(a: tuple[float, float], b: tuple[float, float], x: float) -> float:
    """The value at ``x`` of the power law through ``a`` and ``b``."""
    share = math.log(x / a[0]) / math.log(b[0] / a[0])
    return a[1] * math.pow(b[1] / a[1], share)
