"""Derives the bands of prices (``cost/bands.py``): how far a price of each kind and source lies from a measurement.

    python benchmarks/price_bands.py

Prints, by kind and source, the number of comparisons, the median ratio of price to measurement, and the band: of 80 %
of the comparisons the ratio or its inverse is at most 1 + band. About a minute of processor time. What is compared:

interpolated  a point of a grid, left out, with what its neighbours say of it: a size between two others; a shape
              between others. Neighbours are then twice as far as they are for a real price, so the band errs upwards
scaled        a point at the end of a grid with what the rest says of it beyond its end; experts of one model by
              another's table; collectives of one device by another's curve times the median ratio of the two
roofline      stages of models on devices that have tables, with what they cost without: those with efficiencies of
              their own, and the same with H20's
measured      B200 and GB200, one chip in two machines, and H100 and H200, one chip with two memories: the same point of
              both tables, less the median ratio of the two tables

No table has norms and other passes over rows. They get the band of products of few rows, which are bound by memory too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from narrows.arch.chain import build_chain
from narrows.arch.presets import preset
from narrows.arch.stages import PriceClass, RoutedExperts, RowSet
from narrows.cost.collectives import _curves, collective_price
from narrows.cost.devices import DEVICES, Device, device
from narrows.cost.experts import _CLASSES, _MODELS, _bound, _measured
from narrows.cost.gemm import _GRIDS
from narrows.cost.gemm import _bound as gemm_bound
from narrows.cost.grids import Grid, grids
from narrows.cost.price import Curve
from narrows.cost.pricer import Pricer, StepShape
from narrows.layout import Mesh, full

SHARE = 0.8
KERNELS = (
    ("gemm_bf16", "gemm"),
    ("gemm_fp8", "gemm"),
    ("gemm_fp8_block", "gemm"),
    ("mla_prefill", "attention"),
    ("mla_decode", "attention"),
    ("gqa_prefill", "attention"),
    ("gqa_decode", "attention"),
    ("moe", "experts"),
)
TABLED = tuple(name for name, found in DEVICES.items() if found.kernels == name)

Found = Iterator[tuple[str, str, float]]
"""(kind, source, price over measurement)."""


def left_out(kind: str, curve: Curve) -> Found:
    """Each point of a curve by the others: between two, and the last by those before it."""
    points = list(zip(curve.xs, curve.ys, strict=True))
    if len(points) < 4:
        return
    for i, (x, y) in enumerate(points[1:], 1):
        rest = Curve(xs=curve.xs[:i] + curve.xs[i + 1 :], ys=curve.ys[:i] + curve.ys[i + 1 :])
        yield kind, "interpolated" if i < len(points) - 1 else "scaled", rest.at(x).seconds / y


def between(kind: str, grid: Grid) -> Found:
    """Each curve whose keys lie inside the axes, by the grid without the values of its keys."""
    for key, curve in grid.curves.items():
        inner = [axis.index(value) not in (0, len(axis) - 1) for axis, value in zip(grid.axes, key, strict=True)]
        movable = [i for i, inside in enumerate(inner) if inside]
        if not movable:
            continue
        rest = {k: c for k, c in grid.curves.items() if all(k[i] != key[i] for i in movable)}
        if rest:
            other = Grid.of(rest)
            for size, seconds in list(zip(curve.xs, curve.ys, strict=True))[:: max(1, len(curve.xs) // 6)]:
                price = other.at(other.within(key), size)
                if price.source.label != "scaled":
                    yield kind, "interpolated", price.seconds / seconds


def products_beyond(on: Device, dtype: str) -> Found:
    """Products with the largest n or k of the grid by those with the next."""
    grid = grids(on.name, _GRIDS[dtype]).get(())
    if grid is None:
        return
    peak = on.flops_per_s("fp8" if dtype == "fp8-tensor" else dtype)
    widest, before = ([axis[index] for axis in grid.axes] for index in (-1, -2))
    for (n, k), curve in grid.curves.items():
        for near in [(before[0], k)] * (n == widest[0]) + [(n, before[1])] * (k == widest[1]):
            lent = grid.curves.get(near)
            for m, seconds in zip(curve.xs, curve.ys, strict=True) if lent is not None else ():
                here, there = (gemm_bound(peak, on.hbm_bytes_per_s, m, *at, dtype) for at in ((n, k), near))
                yield "gemm", "scaled", lent.at(m).seconds * max(1.0, here / there) / seconds


def other_models(on: Device) -> Found:
    """Experts of one measured model by the table of the one nearest in shape."""
    tables = grids(on.name, "moe")
    names = {name: shape for shape, name in _MODELS.items()}
    for kind in set(_CLASSES.values()):
        there = [name for name in names if (name, kind, "balanced") in tables]
        for name in there:
            shape = names[name]
            others = [other for other in there if other != name]
            if not others:
                continue
            near = min(others, key=lambda o: sum(abs(math.log(a / b)) for a, b in zip(names[o], shape, strict=True)))
            for ranks, whole in ((1, False), (4, False), (8, False), (8, True)):
                experts = RoutedExperts(*shape, ranks=ranks, whole=whole)
                for rows in (1, 16, 64, 256, 1024, 4096, 16384):
                    own, lent = (_measured(tables[of, kind, "power_law"], experts, rows) for of in (name, near))
                    bounds = _bound(on, shape, experts, rows, kind) / _bound(on, names[near], experts, rows, kind)
                    yield "experts", "scaled", lent.seconds * bounds / own.seconds


def other_devices() -> Found:
    """Collectives of a device by the curves of another with equally fast links: the ratio less its median over sizes,
    which a factor would fit."""
    curves = _curves()
    for (table, op, count, backend), curve in curves.items():
        for other in TABLED:
            lent = curves.get((other, op, count, backend))
            if lent is None or other == table or device(other).link_bytes_per_s != device(table).link_bytes_per_s:
                continue
            ratios = [lent.at(x).seconds / y for x, y in zip(curve.xs, curve.ys, strict=True)]
            for ratio in ratios:
                yield "collective", "scaled", ratio / statistics.median(ratios)


KINDS = {
    PriceClass.QKV_A_PROJ: "gemm",
    PriceClass.MLP: "gemm",
    PriceClass.LM_HEAD: "gemm",
    PriceClass.ATTENTION: "attention",
    PriceClass.EXPERTS: "experts",
}


def without_tables() -> Found:
    """Stages of models priced by rooflines, where there are tables."""
    h20 = device("h20")
    for name in TABLED:
        on = device(name)
        alone = replace(on, kernels=None, name=f"{name} alone")
        like_h20 = replace(
            alone,
            name=f"{name} like h20",
            gemm_efficiency=h20.gemm_efficiency,
            attention_efficiency=h20.attention_efficiency,
        )
        for model in ("deepseek-v3", "qwen3-235b-a22b", "llama-3.1-70b"):
            config = preset(model)
            dtype = "bf16" if on.tflops_fp8 is None else "fp8"
            for tp in (1, 4, 8):
                mesh = Mesh.of(dp=1, tp=tp)
                chain = build_chain(config, mesh)
                stages = {s.name: s for layer in chain.layer_types for s in layer.stages if s.price_class in KINDS}
                for phase, sizes in (("decode", (1, 16, 128)), ("prefill", (512, 4096, 16384))):
                    for rows in sizes:
                        shape = StepShape.of(mesh, (rows,), phase=phase, context=4096)
                        scales = config.moe is not None
                        known, *rough = (
                            Pricer(each, mesh, shape, dtype, itemsize=2, graph=True, block_scales=scales)
                            for each in (on, alone, like_h20)
                        )
                        for prices in rough:
                            for stage in stages.values():
                                at, kind = stage.accepts or full(mesh), KINDS[stage.price_class]
                                guess, truth = (p.stage(stage, at, False, RowSet.ALL).ps for p in (prices, known))
                                ratio = guess / truth
                                yield kind, "roofline", ratio
                                if kind == "gemm" and rows <= 128:
                                    yield "rows", "roofline", ratio


def rooflines_of_links() -> Found:
    """Collectives by latency and link alone, where there are curves."""
    for name in TABLED:
        on = device(name)
        blind = replace(on, collectives=None, name=f"{name} links")
        for op in ("all_reduce", "all_gather", "reduce_scatter"):
            for count in (2, 4, 8):
                for power in range(14, 30):
                    guess, known = (collective_price(each, op, count, 1 << power) for each in (blind, on))
                    yield "collective", "roofline", guess.seconds / known.seconds


def measured_twice() -> Found:
    """The same point on two devices with one chip, less the median ratio of their tables."""
    for one, other in (("b200", "gb200"), ("h100", "h200")):
        for kernel, kind in KERNELS:
            for names, grid in grids(one, kernel).items():
                twin = grids(other, kernel).get(names)
                ratios = [
                    twin.curves[key].at(x).seconds / y
                    for key, curve in grid.curves.items()
                    if twin is not None and key in twin.curves
                    for x, y in zip(curve.xs, curve.ys, strict=True)
                    if x in twin.curves[key].xs
                ]
                for ratio in ratios:
                    yield kind, "measured", ratio / statistics.median(ratios)
    curves = _curves()
    for (table, op, count, backend), curve in curves.items():
        twin = curves.get(({"b200": "gb200", "h100": "h200"}.get(table, ""), op, count, backend))
        if twin is not None:
            ratios = [twin.at(x).seconds / y for x, y in zip(curve.xs, curve.ys, strict=True) if x in twin.xs]
            for ratio in ratios:
                yield "collective", "measured", ratio / statistics.median(ratios)


def comparisons() -> Found:
    for name in TABLED:
        on = device(name)
        for kernel, kind in KERNELS:
            for grid in grids(name, kernel).values():
                for curve in grid.curves.values():
                    yield from left_out(kind, curve)
                if kernel != "moe":
                    yield from between(kind, grid)
        for dtype in _GRIDS:
            if on.tflops_fp8 is not None or dtype == "bf16":
                yield from products_beyond(on, dtype)
        yield from other_models(on)
    for curve in _curves().values():
        yield from left_out("collective", curve)
    yield from other_devices()
    yield from without_tables()
    yield from rooflines_of_links()
    yield from measured_twice()


def main() -> None:
    """Print the bands."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, source, ratio in comparisons():
        found[kind, source].append(ratio)
    print(f"{'kind':12}{'source':14}{'number':>8}{'median':>8}{'band':>8}")
    for (kind, source), ratios in sorted(found.items()):
        errors = sorted(abs(math.log(ratio)) for ratio in ratios)
        band = math.exp(errors[math.ceil(SHARE * len(errors)) - 1]) - 1
        print(f"{kind:12}{source:14}{len(ratios):8}{statistics.median(ratios):8.2f}{band:8.3f}")


if __name__ == "__main__":
    main()
