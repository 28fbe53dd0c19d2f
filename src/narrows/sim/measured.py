"""Measured step times in place of predicted ones, so that what error remains is the simulator's own.

Reads lines of JSON with ``phase``, ``rows`` and ``seconds`` of each step that a server has run
(``benchmarks/simulate/serve_timed.py`` writes them).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

from narrows.cost.pricer import PHASES
from narrows.errors import ConfigError
from narrows.plan.cache import bucket
from narrows.sched.batch import Batch
from narrows.sim.costs import StepCost

__all__ = ["MeasuredCosts", "read_step_times"]

Points = tuple[tuple[float, float], ...]
"""(rows, seconds), by rising rows."""


class MeasuredCosts:
    """The mean seconds of steps of the same phase in the same bucket of rows, and between buckets on the line between
    them; below the first as the first, above the last in proportion to rows."""

    def __init__(self, points: dict[str, Points]) -> None:
        self._points = points

    def cost(self, batch: Batch) -> StepCost:
        """What such a step took."""
        seconds = _at(self._points[batch.phase], batch.num_rows)
        return StepCost(seconds=seconds, parts={("all", "measured"): seconds})


def read_step_times(file: Path) -> MeasuredCosts:
    """The costs that a file of measured steps gives.

    Raises:
        ConfigError: it cannot be read, a line is of another form, or a phase has no step.
    """
    steps: dict[str, dict[int, list[tuple[int, float]]]] = {phase: defaultdict(list) for phase in PHASES}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--step-times {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            phase, rows, seconds = step["phase"], int(step["rows"]), float(step["seconds"])
            if rows < 1 or not 0 < seconds < math.inf:
                raise ValueError(f"a step of {rows} rows and {seconds} seconds")
            steps[phase][bucket(rows)].append((rows, seconds))
        except KeyError as error:
            raise ConfigError(f"line {number} of --step-times {file}: there is no {error.args[0]}") from None
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise ConfigError(f"line {number} of --step-times {file}: {error}") from None
    for phase, found in steps.items():
        if not found:
            raise ConfigError(f"--step-times {file} has no {phase} step; record a load with prompts and texts")
    return MeasuredCosts({phase: _means(found) for phase, found in steps.items()})


def _means(steps: dict[int, list[tuple[int, float]]]) -> Points:
    means = ((sum(r for r, _ in of) / len(of), sum(s for _, s in of) / len(of)) for _, of in sorted(steps.items()))
    return tuple(means)


def _at(points: Points, rows: int) -> float:
    i = bisect_left(points, (rows, 0.0))
    if i == 0:
        return points[0][1]
    if i == len(points):
        return points[-1][1] * max(1.0, rows / points[-1][0])
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
