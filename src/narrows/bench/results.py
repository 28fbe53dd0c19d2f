"""What a benchmark has found, as plain values: one series per work, with every variant's values in it.

The first variant of a series is the one the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from narrows.calibrate.statistics import Spread, ratios, spread

__all__ = ["Outcome", "Series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One work. ``values`` are per variant and round; ``facts`` what else is known of a variant's work, in one number
    each (share of a roofline, predicted time)."""

    work: str
    unit: str
    values: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def spread(self, variant: str) -> Spread:
        return spread(self.values[variant])

    def ratio(self, variant: str) -> Spread | None:
        """To the first variant: round by round, or of the medians if they did not run equally often; None where that
        has a zero."""
        first, values = next(iter(self.values.values())), self.values[variant]
        if not all(first):
            return None
        if len(values) == len(first):
            return ratios(values, first)
        return ratios([spread(values).median], [spread(first).median])

    def document(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "unit": self.unit,
            "variants": {
                name: asdict(self.spread(name))
                | {"ratio_to_first": ratio and ratio.median, "values": list(values)}
                | dict(self.facts.get(name, {}))
                for name, values in self.values.items()
                for ratio in [self.ratio(name)]
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All series of a run, with the notes that belong under its table. ``calibration``: what the machine reached."""

    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()
    calibration: Mapping[str, Spread] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "results": [series.document() for series in self.series],
            "calibration": {name: asdict(found) for name, found in self.calibration.items()},
            "notes": list(self.notes),
        }
