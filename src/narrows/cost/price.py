"""What a step costs and how well that is known. Knows no device, no operation and no layout.

Every price carries its source, and a sum is only as good as its weakest addend. Planners add ``Price.ps``: whole
picoseconds, whose sum does not depend on the order of addition, so that equal plans tie exactly.

>>> Price(2e-6, Source.MEASURED) + Price(4e-6, Source.ROOFLINE)
Price(seconds=6e-06, source=<Source.ROOFLINE: 3>)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["ZERO", "Price", "Source"]


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
    """Predicted seconds of one step, and the weakest evidence behind them."""

    seconds: float
    source: Source

    def __add__(self, other: Price) -> Price:
        """Seconds add; the source is the weaker of the two."""
        return Price(self.seconds + other.seconds, max(self.source, other.source))

    def times(self, n: float) -> Price:
        """The price of doing this ``n`` times (``n`` may be a fraction); no times is ``ZERO``."""
        return Price(self.seconds * n, self.source) if n else ZERO

    @property
    def ps(self) -> int:
        """Whole picoseconds, rounded to nearest: what planners add up and compare."""
        return round(self.seconds * 1e12)


ZERO = Price(0.0, Source.MEASURED)
"""The price of nothing: it adds no time and weakens no source."""
