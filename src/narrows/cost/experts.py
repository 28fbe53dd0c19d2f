"""Prices the routed experts of one layer by measured kernels: both grouped products, activation, permutation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from narrows.arch.stages import RoutedExperts
from narrows.cost.devices import Device
from narrows.cost.grids import Grid, grids
from narrows.cost.price import Price, Source

__all__ = ["experts_price"]

_Shape = tuple[int, int, int, int]

_MODELS: Mapping[_Shape, str] = MappingProxyType(
    {
        (7168, 2048, 256, 8): "deepseek-v3",
        (7168, 2048, 384, 8): "kimi-k2",
        (4096, 1536, 128, 8): "qwen3-235b",
        (2048, 768, 128, 8): "qwen3-30b",
        (6144, 2560, 160, 8): "near-glm-4.5",
    }
)
"""The measured models, by (hidden, intermediate, experts, experts per token)."""
_CLASSES: Mapping[str, str] = MappingProxyType({"bf16": "bf16", "fp8": "fp8_block", "fp8-tensor": "fp8_block"})
_WEIGHT_BYTES: Mapping[str, float] = MappingProxyType({"bf16": 2.0, "fp8_block": 1.0})
_MEASURED_SKEW = 1.01
"""The exponent of the power law by which the measured router chose experts."""


@lru_cache(maxsize=1 << 14)
def experts_price(device: Device, experts: RoutedExperts, rows: int, dtype: str, skew: float) -> Price | None:
    """Seconds of the routed experts of one layer on the busiest rank, for ``rows`` tokens of all ranks together; None
    where the device has no measured kernels for ``dtype``.

    ``skew`` lies between the two routings that were measured: 0 is even, 1.01 and above a power law with that exponent;
    between them the geometric mean by share. A model that was not measured is priced as the one nearest in shape,
    scaled by the rooflines of both. So is one whose experts have a sibling's shape, where that is less: the newest
    kernels were measured on some models only. Source: NVIDIA AIConfigurator.
    """
    kind = _CLASSES.get(dtype)
    if kind is None or device.kernels is None or not rows:
        return None
    found = grids(device.kernels, "moe")
    wanted = (experts.hidden, experts.intermediate, experts.experts, experts.top_k)
    shapes = [shape for shape, name in _MODELS.items() if (name, kind, "balanced") in found]
    if not shapes:
        return None
    nearest = min(shapes, key=lambda known: math.dist(_logs(known), _logs(wanted)))
    siblings = [shape for shape in shapes if shape[:2] == wanted[:2] and shape != nearest]
    prices = []
    for shape in (nearest, *siblings):
        tables = (found[_MODELS[shape], kind, routing] for routing in ("balanced", "power_law"))
        even, uneven = (_measured(table, experts, rows) for table in tables)
        share = min(1.0, skew / _MEASURED_SKEW)
        seconds = even.seconds ** (1 - share) * uneven.seconds**share
        source = max(even.source, uneven.source) if share in (0.0, 1.0) else max(even.source, Source.INTERPOLATED)
        if shape != wanted:
            seconds *= _bound(device, wanted, experts, rows, kind) / _bound(device, shape, experts, rows, kind)
        own = device.kernels == device.name and shape == wanted
        prices.append(Price(seconds, source if own else max(source, Source.SCALED)))
    return min(prices, key=lambda price: price.seconds)


def _measured(grid: Grid, experts: RoutedExperts, rows: int) -> Price:
    """Experts split over ``ranks`` (tp), or held whole by them (ep), beyond the measured counts in proportion."""
    key = (1, experts.ranks) if experts.whole else (experts.ranks, 1)
    inside = grid.within(key)
    price = grid.at(inside, rows)
    return price if inside == key else Price(price.seconds * max(inside) / experts.ranks, Source.SCALED)


def _bound(device: Device, shape: _Shape, experts: RoutedExperts, rows: int, kind: str) -> float:
    """Seconds of the roofline on one rank: the products, or reading the experts that some row chose."""
    hidden, intermediate, count, top_k = shape
    pairs, weights = rows * top_k / experts.ranks, 3 * hidden * intermediate
    touched = -count * math.expm1(rows * math.log1p(-top_k / count)) / experts.ranks if top_k < count else count
    rate = device.flops_per_s("bf16" if kind == "bf16" else "fp8")
    return max(2 * pairs * weights / rate, touched * weights * _WEIGHT_BYTES[kind] / device.hbm_bytes_per_s)


def _logs(shape: _Shape) -> tuple[float, ...]:
    return tuple(math.log(size) for size in shape)
