"""What layouts cost in a grid of steps, measured beside priced: choices, regret, errors.

Layouts whose plans run the same ops are one entry, so that noise between two runs of the same thing is never regret.
Times are compared within rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from narrows.bench.results import Outcome, Series
from narrows.calibrate.statistics import Spread, median_interval, quantile, ratios
from narrows.plan.plan import Plan
from narrows.plan.report.evidence import Evidence

__all__ = ["WITHIN", "Cell", "Grid", "PlanTimes", "Summary", "by_layout", "grid_of", "summary"]

WITHIN = 0.03
"""A choice that costs at most this share more than the best counts as right."""


@dataclass(frozen=True, kw_only=True)
class PlanTimes:
    """One plan in one cell. ``step_s``: seconds of the whole step by round, without clocks around its ops.
    ``clocked_s``: rounds with a clock around every op: what each cost in the plan's order, together as long as the
    mean rank took; a wait for another rank's work counts as that work (`calibrate/wait_attribution.py`)."""

    layouts: tuple[str, ...]
    plan: Plan
    step_s: tuple[float, ...]
    clocked_s: tuple[tuple[float, ...], ...]

    @property
    def name(self) -> str:
        """The layouts whose plan it is.

        >>> " = ".join(("all-reduce", "auto"))
        'all-reduce = auto'
        """
        return " = ".join(self.layouts)

    @cached_property
    def seconds(self) -> float:
        """The median whole step."""
        return quantile(self.step_s, 0.5)

    @cached_property
    def execution(self) -> float:
        """Median seconds of the plan's execution, in the rounds with clocks."""
        return quantile([sum(times) for times in self.clocked_s], 0.5)

    @property
    def outside(self) -> float:
        """Seconds outside the plan: transport of batch and result, row counts, page tables."""
        return max(self.seconds - self.execution, 0.0)

    @property
    def execution_error(self) -> float:
        """Predicted over measured seconds of the plan's execution, less 1."""
        return (self.plan.seconds - self.plan.host_overhead.seconds) / self.execution - 1

    @property
    def error(self) -> float:
        """Predicted over measured whole step, less 1."""
        return self.plan.seconds / self.seconds - 1

    @property
    def sources(self) -> dict[str, float]:
        """What the price rests on: shares of its seconds by the source of each op's price, the best source first."""
        return Evidence.of(self.plan).shares

    @cached_property
    def classes(self) -> dict[str, float]:
        """Median seconds per price class, of the rounds with clocks around ops."""
        found: dict[str, list[float]] = {}
        names = [str(op.price_class) for _, op in self.plan.ops()]
        for times in self.clocked_s:
            sums = dict.fromkeys(names, 0.0)
            for name, seconds in zip(names, times, strict=True):
                sums[name] += seconds
            for name, seconds in sums.items():
                found.setdefault(name, []).append(seconds)
        return {name: quantile(values, 0.5) for name, values in found.items()}

    @cached_property
    def segment_s(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of every op of every segment: the mean over its layers, the median over rounds."""
        rounds = [self._by_segment(times) for times in self.clocked_s]
        return tuple(
            tuple(quantile(values, 0.5) for values in zip(*of_rounds, strict=True))
            for of_rounds in zip(*rounds, strict=True)
        )

    def _by_segment(self, times: Sequence[float]) -> list[tuple[float, ...]]:
        out, at = [], 0
        for segment in self.plan.segments:
            num = len(segment.ops)
            layers = [times[at + i * num : at + (i + 1) * num] for i in range(segment.times)]
            out.append(tuple(sum(of_layers) / len(layers) for of_layers in zip(*layers, strict=True)))
            at += segment.times * num
        return out

    def document(self) -> dict[str, Any]:
        """As plain data; times in milliseconds, those of single ops in microseconds."""
        predicted = {str(name): seconds for name, seconds in self.plan.totals().items()}
        low, high = median_interval(self.step_s)
        return {
            "layouts": list(self.layouts),
            "measured_ms": 1e3 * self.seconds,
            "measured_between_ms": [1e3 * low, 1e3 * high],
            "rounds": len(self.step_s),
            "predicted_ms": 1e3 * self.plan.seconds,
            "error": self.error,
            "execution_ms": 1e3 * self.execution,
            "execution_error": self.execution_error,
            "outside_ms": 1e3 * self.outside,
            "sources": self.sources,
            "classes_ms": {
                name: {"measured": 1e3 * self.classes.get(name, 0.0), "predicted": 1e3 * seconds}
                for name, seconds in predicted.items()
                if seconds or self.classes.get(name)
            },
            "ops": [
                {
                    "segment": segment.name,
                    "times": segment.times,
                    "name": op.name,
                    "boundary": op.boundary,
                    "class": str(op.price_class),
                    "fields": list(op.reads),
                    "layout": str(op.layout),
                    "leaves": str(op.leaves),
                    "rows": op.rows,
                    "bytes": op.nbytes,
                    "measured_us": 1e6 * seconds,
                    "predicted_us": 1e6 * op.seconds,
                    "source": op.source.label,
                }
                for segment, of_steps in zip(self.plan.segments, self.segment_s, strict=True)
                for op, seconds in zip(segment.ops, of_steps, strict=True)
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One step of the grid under every plan. One of them is `auto`'s: what the prices chose."""

    title: str
    phase: str
    rows: int
    context: int
    plans: tuple[PlanTimes, ...]

    @cached_property
    def chosen(self) -> PlanTimes:
        """The plan of `auto`."""
        return next(one for one in self.plans if "auto" in one.layouts)

    def chosen_over(self, one: PlanTimes) -> Spread:
        """How often the time of ``one`` the chosen plan took, round by round."""
        return ratios(self.chosen.step_s, one.step_s)

    @cached_property
    def best(self) -> PlanTimes:
        """The fastest: the plan that the chosen one took longest in terms of; the chosen one itself if none is
        faster."""
        return max((self.chosen, *self.plans), key=lambda one: self.chosen_over(one).median)

    @cached_property
    def regret(self) -> float:
        """What the choice costs more than the best, as a share of the best; at least 0."""
        return self.chosen_over(self.best).median - 1

    @property
    def regret_between(self) -> tuple[float, float]:
        """Where the regret towards that plan lies, with 90 % confidence in the rounds there were."""
        pairs = zip(self.chosen.step_s, self.best.step_s, strict=True)
        low, high = median_interval([mine / its for mine, its in pairs])
        return low - 1, high - 1

    @property
    def is_right(self) -> bool:
        """Whether the choice is the best or costs at most 3 % more."""
        return self.regret <= WITHIN

    @cached_property
    def named_pick(self) -> str:
        """The named layout that the prices would pick; of equal ones the first. Empty if `auto` alone was measured."""
        prices = {name: one.plan.ps for one in self.plans for name in one.layouts if name != "auto"}
        return min(prices, key=lambda name: prices[name], default="")

    @property
    def named_regret(self) -> float:
        """What that one costs more than the best named layout, as a share of the best."""
        named = [one for one in self.plans if one.layouts != ("auto",)]
        mine = next((one for one in named if self.named_pick in one.layouts), None)
        return max(ratios(mine.step_s, one.step_s).median for one in named) - 1 if mine is not None else 0.0

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "step": self.title,
            "phase": self.phase,
            "rows": self.rows,
            "context": self.context,
            "plans": [one.document() for one in self.plans],
            "chosen": list(self.chosen.layouts),
            "best": list(self.best.layouts),
            "regret": self.regret,
            "regret_between": list(self.regret_between),
            "within_3_percent": self.is_right,
            "named_pick": self.named_pick,
            "named_regret": self.named_regret,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All cells. ``surely_wrong``: those whose regret is beyond 3 % with 90 % confidence. Errors are of every plan in
    every cell, without their signs; ``mean_execution_error`` is of the plan's execution alone."""

    cells: int
    right: int
    surely_wrong: int
    share_right: float
    worst_regret: float
    worst_step: str
    mean_regret: float
    mean_error: float
    mean_execution_error: float
    named_worst_regret: float


def summary(cells: Sequence[Cell]) -> Summary:
    """The :class:`Summary` of at least one cell."""
    worst = max(cells, key=lambda cell: cell.regret)
    plans = [one for cell in cells for one in cell.plans]
    right = sum(cell.is_right for cell in cells)
    return Summary(
        cells=len(cells),
        right=right,
        surely_wrong=sum(cell.regret_between[0] > WITHIN for cell in cells),
        share_right=right / len(cells),
        worst_regret=worst.regret,
        worst_step=worst.title,
        mean_regret=sum(cell.regret for cell in cells) / len(cells),
        mean_error=sum(abs(one.error) for one in plans) / len(plans),
        mean_execution_error=sum(abs(one.execution_error) for one in plans) / len(plans),
        named_worst_regret=max(cell.named_regret for cell in cells),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid(Outcome):
    """All cells of a run; ``series`` has their whole steps."""

    cells: tuple[Cell, ...]

    @property
    def summary(self) -> Summary:
        return summary(self.cells)

    def document(self) -> dict[str, Any]:
        return {
            **Outcome.document(self),
            "cells": [cell.document() for cell in self.cells],
            "summary": asdict(self.summary),
        }


def by_layout(cell: Cell) -> dict[str, PlanTimes]:
    """Every layout's plan, `auto`'s last."""
    held = {name: one for one in cell.plans for name in one.layouts}
    return {name: held[name] for name in sorted(held, key=lambda name: name == "auto")}


def grid_of(cells: Sequence[Cell], notes: Sequence[str], calibration: Mapping[str, Spread] | None = None) -> Grid:
    """The outcome of a run. The series have every layout under its own name, so that all have the same ones."""
    return Grid(
        series=tuple(
            Series(
                work=cell.title,
                unit="ms",
                values={name: tuple(1e3 * s for s in one.step_s) for name, one in by_layout(cell).items()},
                facts={name: {"predicted_ms": 1e3 * one.plan.seconds} for name, one in by_layout(cell).items()},
            )
            for cell in cells
        ),
        notes=tuple(notes),
        calibration=calibration or {},
        cells=tuple(cells),
    )
