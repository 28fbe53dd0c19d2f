"""How far off a price may be, by what it is for and where it comes from: its band.

A band of 0.2 says: of 80 % of the comparisons with measurements, the ratio or its inverse is at most 1.2. The figures
are those that ``benchmarks/price_bands.py`` prints for the tables of this package; a profile of one's own machine has
the scatter of its own measurements. A price between two points has the error of the points too, and a scaled one that
of the interpolation that it began with. Errors of one kind of price are taken to go together (one table, one kernel),
those of different kinds to be independent.

>>> round(band(PriceClass.MLP, Source.MEASURED), 2), round(band(PriceClass.MLP, Source.ROOFLINE), 2)
(0.14, 0.47)
>>> round(total_band([(PriceClass.MLP, 1.0, 0.3), (PriceClass.LM_HEAD, 1.0, 0.1), (PriceClass.EXPERTS, 2.0, 0.3)]), 3)
0.125
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Norm, PriceClass, Stream, Work
from narrows.cost.price import Source

__all__ = ["KINDS", "KIND_WORDS", "SERVED", "SHARE", "band", "total_band", "work_band"]

SHARE = 0.8
"""Of the comparisons, those that a band holds."""

KINDS: Mapping[PriceClass, str] = MappingProxyType(
    {
        PriceClass.EMBED: "rows",
        PriceClass.QKV_A_PROJ: "gemm",
        PriceClass.NORM: "rows",
        PriceClass.ADD: "rows",
        PriceClass.ROUTER: "gemm",
        PriceClass.ATTENTION: "attention",
        PriceClass.MLP: "gemm",
        PriceClass.EXPERTS: "experts",
        PriceClass.COMMUNICATION: "collective",
        PriceClass.LM_HEAD: "gemm",
        PriceClass.SAMPLE: "rows",
        PriceClass.HOST: "host",
    }
)

KIND_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "rows": "norms and other passes over rows",
        "gemm": "products",
        "attention": "attention",
        "experts": "experts",
        "collective": "collectives",
        "host": "the host",
    }
)

_WORKS: Mapping[type[Work], str] = MappingProxyType(
    {Gemm: "gemm", GroupedGemm: "experts", Norm: "rows", Stream: "rows", AttentionCore: "attention"}
)

_ERRORS: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {
        # measured, what interpolation adds, what scaling adds, roofline
        "gemm": (0.142, 0.111, 0.115, 0.469),
        "attention": (0.169, 0.153, 0.211, 0.559),
        "experts": (0.119, 0.075, 0.278, 0.653),
        "collective": (0.047, 0.088, 0.044, 1.111),
        "rows": (0.142, 0.111, 0.115, 0.284),  # no table has them: products', and of few rows where a roofline says it
    }
)

SERVED: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "sglang": {"ttft": (0.8, 2.18), "tpot": (0.87, 1.2)},
        "vllm": {"ttft": (0.64, 1.04), "tpot": (0.9, 1.07)},
        "trtllm": {"ttft": (0.3, 2.43), "tpot": (0.75, 1.11)},
    }
)
"""Published over simulated, by engine and figure: the factors between which 8 of 10 published runs lie, as
``benchmarks/published_runs.py`` prints them. The simulation's few numbers of each engine were fitted to the same runs.
"""


def band(price_class: PriceClass, source: Source, scatter: float | None = None) -> float:
    """The relative error of one price of a class. The host's, fitted to served loads as a whole, has none: 0.

    ``scatter``: of the measurements that it rests on, where those of a machine's own profile say it.
    """
    kind = KINDS[price_class]
    if scatter is None or source is Source.ROOFLINE or kind == "host":
        return kind_band(kind, source)
    return math.hypot(scatter, *_ERRORS[kind][1 : 1 + int(source)])


@cache
def kind_band(kind: str, source: Source) -> float:
    """The relative error of one price of a kind."""
    if kind == "host":
        return 0.0
    measured, *added, roofline = _ERRORS[kind]
    if source is Source.ROOFLINE:
        return roofline
    return math.hypot(measured, *added[: int(source)])


def work_band(item: Work, source: Source) -> float:
    """The relative error of one item of a stage's work."""
    return kind_band(_WORKS[type(item)], source)


def total_band(parts: Iterable[tuple[PriceClass, float, float]]) -> float:
    """The relative error of a sum of prices: (what for, time, error), in any unit of time."""
    total, by_kind = 0.0, dict.fromkeys(KINDS.values(), 0.0)
    for price_class, time, error in parts:
        total += time
        by_kind[KINDS[price_class]] += error
    return math.hypot(*by_kind.values()) / total if total else 0.0
