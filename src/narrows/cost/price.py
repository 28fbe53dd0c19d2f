"""A price: predicted seconds and how well they are known; and curves, which give prices between measured points.

Every price carries its source, and a sum is only as good as its weakest addend. Planners add ``Price.ps``: whole
picoseconds, whose sum does not depend on the order of addition, so that equal plans tie exactly.

>>> Price(2e-6, Source.MEASURED) + Price(4e-6, Source.ROOFLINE)
Price(seconds=6e-06, source=<Source.ROOFLINE: 3>)
"""

from __future__ import annotations

import enum
import math
import pkgutil
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["ZERO", "Curve", "Price", "Source", "read_rows"]

_GLITCH = 2.0
"""A point above so many times the line between its neighbours is a fault of the sweep, not a property of the machine.

Such points exist: H100 all-reduce of 1 KiB in a graph, 38 us between 3.3 and 3.5; H100 and H200 block FP8 at 2048 rows,
167 us between 31 (1024 rows) and 123 (4096 rows). Left in, they would decide plans.
"""


class Source(enum.IntEnum):
    """Where a price comes from; a larger value is weaker evidence."""

    MEASURED = 0  # a point of this device's own table
    INTERPOLATED = 1  # between two points of this device's own table
    SCALED = 2  # from another device, shape, group size or range, by a stated factor
    ROOFLINE = 3  # from peaks, bandwidths and efficiencies alone

    @property
    def label(self) -> str:
        """The lower-case name that plans print."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Price:
    """Predicted seconds of one op, and the weakest evidence behind them.

    ``error``: how many seconds it may be off (:mod:`narrows.cost.bands`); 0 where none is known yet.
    """

    seconds: float
    source: Source
    error: float = field(default=0.0, compare=False, repr=False)

    def __add__(self, other: Price) -> Price:
        """Seconds add, and errors; the source is the weaker of the two."""
        return Price(self.seconds + other.seconds, max(self.source, other.source), self.error + other.error)

    def times(self, n: float) -> Price:
        """The price of doing this ``n`` times (``n`` may be a fraction); no times is ``ZERO``."""
        return Price(self.seconds * n, self.source, self.error * n) if n else ZERO

    @property
    def ps(self) -> int:
        """Whole picoseconds, rounded to nearest: what planners add up and compare."""
        return round(self.seconds * 1e12)


ZERO = Price(0.0, Source.MEASURED)
"""The price of nothing: it adds no time and weakens no source."""


def read_rows(name: str, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of ``data/<name>``, one list of texts per line; the header must be exactly ``columns``.

    Read when first needed, never at import.
    """
    data = pkgutil.get_data(__package__, f"data/{name}")
    assert data is not None, f"data/{name} is missing from the package"
    header, *lines = data.decode("ascii").split()
    assert tuple(header.split(",")) == columns, f"data/{name} has columns {header}, not {','.join(columns)}"
    return [line.split(",") for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds over one size (bytes, rows): ``xs`` strictly increasing and positive, ``ys`` positive, two or more.

    Interpolation is a straight line in log-log, because sizes and times span six decades. Fits (alpha + bytes /
    bandwidth) mislead above 128 MiB.
    """

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
