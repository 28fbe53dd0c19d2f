"""A run drawn as bars, one panel per unit, one group of bars per work. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrows.bench.results import Outcome
from narrows.errors import ConfigError

__all__ = ["check_plot", "plot"]


def check_plot(file: str) -> Any:
    """matplotlib's figure class, imported before anything runs.

    Raises:
        ConfigError: it is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'narrows[plot]'") from None
    suffixes = Figure().canvas.get_supported_filetypes()
    if Path(file).suffix.lstrip(".").lower() not in suffixes:
        raise ConfigError(f"--plot {file}: the name must end in one of {', '.join(sorted(suffixes))}")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: there is no folder {Path(file).absolute().parent}")
    return Figure


def plot(outcome: Outcome, title: str, file: str) -> None:
    """Medians as bars, p10 to p90 as whiskers."""
    units = list(dict.fromkeys(series.unit for series in outcome.series))
    most = max(sum(series.unit == unit for series in outcome.series) for unit in units)
    figure = check_plot(file)(figsize=(max(6.0, 1.1 * most), 3.6 * len(units)), layout="constrained")
    figure.suptitle(title)
    for panel, unit in zip(figure.subplots(len(units), squeeze=False)[:, 0], units, strict=True):
        held = [series for series in outcome.series if series.unit == unit]
        variants = list(held[0].values)
        width = 0.8 / len(variants)
        for at, name in enumerate(variants):
            spreads = [series.spread(name) for series in held]
            panel.bar(
                [i + (at - (len(variants) - 1) / 2) * width for i in range(len(held))],
                [found.median for found in spreads],
                width,
                yerr=[[s.median - s.p10 for s in spreads], [s.p90 - s.median for s in spreads]],
                label=name,
            )
        panel.set_xticks(range(len(held)), [series.work for series in held], rotation=30, ha="right")
        panel.set_ylabel(unit)
        panel.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"--plot {file} cannot be written: {error.strerror}") from None
