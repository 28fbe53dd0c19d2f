"""Between what and what a served figure will probably lie, as factors of the prediction.

The scatter of published runs of the engine around their simulations, or that of the prices if it is wider: published
runs are of devices with measured kernels.
"""

from __future__ import annotations

from narrows.advise.search import Trial
from narrows.cost.bands import SERVED

__all__ = ["price_band", "served_bands"]

Bands = dict[str, tuple[float, float]]


def price_band(trial: Trial) -> float:
    """How far off the prices of its steps may be: of each phase's step that took most of the time, by their times."""
    found = trial.longest.values()
    return sum(plan.band * seconds for plan, seconds in found) / (sum(seconds for _, seconds in found) or 1.0)


def served_bands(engine: str, trial: Trial) -> Bands:
    """``ttft`` and ``tpot``: the factors between which the measured figure lies in 8 of 10 cases."""
    prices = price_band(trial)
    return {which: (min(low, 1 / (1 + prices)), max(high, 1 + prices)) for which, (low, high) in SERVED[engine].items()}
