"""Prices a GEMM, and the grouped GEMM of experts: seconds by device, rows, shape and dtype.

``out[m, n] = x[m, k] @ w[n, k].T``. Most GPUs have grids over (n, k, m), which are interpolated. The L40S has a table
of eight (n, k) of DeepSeek-V3; the efficiency that the nearest of them reach against the roofline is applied to the
roofline of another shape. A device without tables has a roofline with a stated efficiency.

What is not known: tile and wave effects of shapes that were not measured (leaving each shape out and predicting it from
the others errs by a factor of 1.1 in bf16 and 1.3 in FP8 from 2K rows up, 1.3 and 1.5 below, and 6 at worst), how
unevenly rows fall on experts, and fused epilogues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType

from narrows.cost.devices import Device, device
from narrows.cost.grids import grids
from narrows.cost.price import ZERO, Curve, Price, Source, read_rows
from narrows.errors import ConfigError

__all__ = ["absorbed_price", "gemm_price", "grouped_gemm_price"]

_BYTES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "bf16": (2, 2, 2),
        "fp8": (1, 1, 2),
        "fp8-tensor": (1, 1, 2),
        "int8": (1, 1, 2),
        "int8-weight-only": (2, 1, 2),
        "stored": (1, 1, 2),
        "fp32": (4, 4, 4),
    }
)
"""Of a value of x, of w and of the result; of a ``stored`` w it is the caller's to say."""
_TABLE_DTYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("bfloat16",),
        "fp8": ("fp8_block", "fp8"),
        "fp8-tensor": ("fp8",),
        "int8": (),
        "int8-weight-only": (),
        "stored": (),
        "fp32": (),
    }
)
_GRIDS: Mapping[str, str] = MappingProxyType({"bf16": "gemm_bf16", "fp8": "gemm_fp8_block", "fp8-tensor": "gemm_fp8"})
"""The measured grid of each dtype."""
_FP32_EFFICIENCY = 0.8
_TILE_ROWS = 64
_NUM_NEIGHBOURS = 3


def gemm_price(device: Device, m: int, n: int, k: int, dtype: str, of_w: float | None = None) -> Price:
    """Seconds of ``out[m, n] = x[m, k] @ w[n, k].T``, launch included. ``of_w``: bytes of a value of w; None: those of
    ``dtype``.

    ``dtype`` (of x and w) is ``bf16``, ``fp8`` (block-scaled where the device's table has it; out in bf16), ``int8``
    (out in bf16), ``int8-weight-only`` (w alone, at the rate of bf16), ``stored`` (w in blocks, x as int8) or ``fp32``
    (always a roofline: the router of the reference implementation). ``m == 0`` is ``ZERO``.

    Raises:
        ConfigError: another dtype, or ``fp8`` on a device that has none.
    """
    return _gemm_price(device, m, n, k, dtype, of_w)


def grouped_gemm_price(
    device: Device, pairs: int, experts: float, n: int, k: int, dtype: str, of_w: float | None = None
) -> Price:
    """Seconds of one grouped GEMM: ``pairs`` rows, spread over the ``experts`` that the rank holds, each with w[n, k].

    If every pair falls on any of the experts alike, the number of experts touched is
    ``experts * (1 - (1 - 1 / experts) ** pairs)`` in expectation, and only their weights are read. The price is the
    lower of two: one GEMM of ``pairs / touched`` rows after the other, the launch paid once; or one GEMM of all rows,
    each expert's rounded up to 64-row tiles, but not less than the reading of the weights. ``pairs == 0`` is ``ZERO``.
    Real routing is less even: the busiest rank is the caller's to count.

    Raises:
        ConfigError: fewer than one expert on the rank, another dtype, or ``fp8`` on a device that has none.
    """
    return _grouped_gemm_price(device, pairs, experts, n, k, dtype, of_w)


@lru_cache(maxsize=1 << 16)
def _gemm_price(on: Device, m: float, n: int, k: int, dtype: str, of_w: float | None) -> Price:
    assert m >= 0 and n >= 1 and k >= 1, f"a GEMM of m, n, k = {m}, {n}, {k}"
    peak = on.flops_per_s("fp8" if dtype == "fp8-tensor" else dtype)
    if m == 0:
        return ZERO
    if (found := _of_grid(on, peak, m, n, k, dtype)) is not None:
        return found
    shapes = _shapes(on.gemm, dtype)
    if not shapes:
        compute = peak * (_FP32_EFFICIENCY if dtype == "fp32" else on.gemm_efficiency)
        memory = on.hbm_bytes_per_s * on.gemm_memory_efficiency
        return Price(_bound(compute, memory, m, n, k, dtype, of_w) + on.gemm_launch_s, Source.ROOFLINE)
    assert on.gemm is not None
    bound = _bound(peak, on.hbm_bytes_per_s, m, n, k, dtype)
    if on.gemm == on.name and (n, k) in shapes:
        found = _rows(shapes[n, k], m)
        # A sweep runs one GEMM again and again: small weights come from the cache (L40S). In a model they do not.
        return found if found.seconds >= bound else Price(bound, Source.ROOFLINE)
    return Price(max(bound / _efficiency(on.gemm, m, n, k, dtype), _floor(on, dtype)), Source.SCALED)


@lru_cache(maxsize=1 << 16)
def _grouped_gemm_price(
    on: Device, pairs: int, experts: float, n: int, k: int, dtype: str, of_w: float | None
) -> Price:
    assert pairs >= 0, f"{pairs} rows"
    if experts < 1:
        raise ConfigError(
            f"{experts:g} experts on a rank: a rank holds whole experts, at least one; use fewer ranks, or split inside"
        )
    peak = on.flops_per_s("fp8" if dtype == "fp8-tensor" else dtype)
    if pairs == 0:
        return ZERO
    # In expectation a fraction of an expert fewer than one may come out of rounding.
    touched = max(1.0, -experts * math.expm1(pairs * math.log1p(-1 / experts))) if experts > 1 else 1.0
    m = pairs / touched
    single = _gemm_price(on, m, n, k, dtype, of_w)
    launch = _floor(on, dtype)
    # However many experts follow each other, none beats the peak, or the bandwidth of a plain stream of weights.
    limit = _bound(peak, on.hbm_bytes_per_s * on.stream_efficiency, m, n, k, dtype, of_w)
    each = min(single.seconds, max(single.seconds - launch, limit))
    # A grouped kernel also fills the device with other experts' tiles where one expert's would leave it idle: then it
    # is one GEMM of all rows, each expert's rounded up to tiles, or the reading of all weights.
    dense = _gemm_price(on, touched * math.ceil(m / _TILE_ROWS) * _TILE_ROWS, n, k, dtype, of_w)
    read = touched * _bound(math.inf, on.hbm_bytes_per_s * on.stream_efficiency, m, n, k, dtype, of_w)
    together = max(dense.seconds, read + launch)
    return Price(min(touched * each + launch, together), max(single.source, Source.SCALED))


def absorbed_price(on: Device, heads: int, rows: int, dtype: str) -> Price | None:
    """Seconds of the two products per head around DeepSeek's decode attention: queries into the latent (128 to 512),
    and what was read out of it (512 to 128). None where they were not measured. ``dtype`` is that of the weights."""
    found = grids(on.kernels, "mla_bmm") if on.kernels is not None else {}
    kind = "bf16" if dtype == "bf16" else "fp8"
    if ("pre", kind) not in found or dtype == "fp32":
        return None
    before, after = (found[op, kind].at(found[op, kind].within((heads,)), rows) for op in ("pre", "post"))
    price = before + after
    return price if on.kernels == on.name else Price(price.seconds, max(price.source, Source.SCALED))


def _of_grid(on: Device, peak: float, m: float, n: int, k: int, dtype: str) -> Price | None:
    """From the measured grid: interpolated within it, beyond it in proportion to the roofline. None without a grid."""
    found = grids(on.kernels, _GRIDS[dtype]) if on.kernels is not None and dtype in _GRIDS else {}
    if not found:
        return None
    inside = found[()].within((n, k))
    price = found[()].at(inside, m)
    bound = _bound(peak, on.hbm_bytes_per_s, m, n, k, dtype)
    if inside != (n, k):
        beyond = max(1.0, bound / _bound(peak, on.hbm_bytes_per_s, m, int(inside[0]), int(inside[1]), dtype))
        price = Price(price.seconds * beyond, Source.SCALED)
    if on.kernels != on.name:
        price = Price(price.seconds, max(price.source, Source.SCALED))
    return price if price.seconds >= bound else Price(bound, Source.ROOFLINE)


def _bound(
    flops_per_s: float, bytes_per_s: float, m: float, n: int, k: int, dtype: str, of_w: float | None = None
) -> float:
    """The roofline: the larger of compute and memory traffic, seconds."""
    of_x, usual, of_result = _BYTES[dtype]
    of_w = usual if of_w is None else of_w
    traffic = m * k * of_x + n * k * of_w + m * n * of_result
    return max(2.0 * m * n * k / flops_per_s, traffic / bytes_per_s)


def _rows(curve: Curve, m: float) -> Price:
    """Seconds at ``m`` rows; above the table time grows with the rows, below it (m < 1) it stays."""
    last = curve.xs[-1]
    return Price(curve.ys[-1] * (m / last), Source.SCALED) if m > last else curve.at(m)


def _efficiency(table: str, m: float, n: int, k: int, dtype: str) -> float:
    """The share of its roofline that shape (n, k) reaches at ``m`` rows on the table's own device.

    A shape of the table: as measured. Another: the nearest ones, blended by the inverse of their distance in (log n,
    log k). At most 1: more means that the sweep read its weights from the cache.
    """
    measured, shapes = device(table), _shapes(table, dtype)
    peak, bandwidth = measured.flops_per_s(dtype), measured.hbm_bytes_per_s

    def reached(shape: tuple[int, int]) -> float:
        return min(1.0, _bound(peak, bandwidth, m, *shape, dtype) / _rows(shapes[shape], m).seconds)

    if (n, k) in shapes:
        return reached((n, k))
    near = _neighbours(table, n, k, dtype)
    return sum(weight * reached(shape) for shape, weight in near) / sum(weight for _, weight in near)


@cache
def _neighbours(table: str, n: int, k: int, dtype: str) -> tuple[tuple[tuple[int, int], float], ...]:
    """The shapes of the table nearest to (n, k), which is not among them, with the inverse of their distance."""
    distances = sorted((math.hypot(math.log(a / n), math.log(b / k)), (a, b)) for a, b in _shapes(table, dtype))
    return tuple((shape, 1.0 / distance) for distance, shape in distances[:_NUM_NEIGHBOURS])


def _floor(on: Device, dtype: str) -> float:
    """What a GEMM costs however small: the shortest time in the table, or the device's launch."""
    if on.kernels is not None and dtype in _GRIDS and (grid := grids(on.kernels, _GRIDS[dtype]).get(())) is not None:
        return min(min(curve.ys) for curve in grid.curves.values())
    shapes = _shapes(on.gemm, dtype)
    return min(min(curve.ys) for curve in shapes.values()) if shapes else on.gemm_launch_s


@cache
def _shapes(table: str | None, dtype: str) -> Mapping[tuple[int, int], Curve]:
    """Seconds over rows by (n, k); empty where nothing was measured."""
    for name in _TABLE_DTYPES[dtype]:
        if table is not None and (found := _tables().get((table, name))):
            return found
    return MappingProxyType({})


@cache
def _tables() -> Mapping[tuple[str, str], Mapping[tuple[int, int], Curve]]:
    """Seconds over rows, by (table, its dtype) and then by (n, k)."""
    points: dict[tuple[str, str], dict[tuple[int, int], list[tuple[float, float]]]] = {}
    columns = ("device", "dtype", "m", "n", "k", "us", "tflops")
    for table, dtype, m, n, k, us, _ in read_rows("gemm.csv", columns):
        shapes = points.setdefault((table, dtype), {})
        shapes.setdefault((int(n), int(k)), []).append((float(m), float(us) * 1e-6))
    return MappingProxyType(
        {
            key: MappingProxyType({shape: Curve.of(found) for shape, found in shapes.items()})
            for key, shapes in points.items()
        }
    )
