"""Interpolation goes through its points, stays between them, and leaves out glitches of the sweep."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cost import Source
from narrows.cost.price import Curve, read_rows

times = st.floats(min_value=1e-7, max_value=1e-1)
curves = st.lists(times, min_size=2, max_size=24).map(
    lambda ys: Curve(xs=tuple(512.0 * 2**i for i in range(len(ys))), ys=tuple(ys))
)


@settings(deadline=None)
@given(curves, st.floats(min_value=0.0, max_value=1.0), st.data())
def test_a_point_between_two_is_between_their_times(curve: Curve, share: float, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(curve.xs) - 2))
    x = curve.xs[i] * (curve.xs[i + 1] / curve.xs[i]) ** share
    low, high = sorted(curve.ys[i : i + 2])
    found = curve.at(x)
    assert low * (1 - 1e-9) <= found.seconds <= high * (1 + 1e-9)
    assert found.source == (Source.MEASURED if x in curve.xs else Source.INTERPOLATED)


@settings(deadline=None)
@given(curves)
def test_measured_points_are_reproduced_exactly(curve: Curve) -> None:
    for x, y in zip(curve.xs, curve.ys, strict=True):
        assert (curve.at(x).seconds, curve.at(x).source) == (y, Source.MEASURED)


def test_the_middle_of_two_points_is_their_geometric_mean() -> None:
    curve = Curve(xs=(100.0, 400.0), ys=(1e-6, 9e-6))
    assert curve.at(200).seconds == pytest.approx(3e-6)


def test_outside_the_table() -> None:
    curve = Curve(xs=(10.0, 20.0, 40.0), ys=(1e-6, 1e-6, 3e-6))
    assert (curve.at(1).seconds, curve.at(1).source) == (1e-6, Source.SCALED)
    assert curve.at(60).seconds == pytest.approx(5e-6)
    assert curve.at(60).source == Source.SCALED
    falling = Curve(xs=(10.0, 20.0), ys=(2e-6, 1e-6))
    assert falling.at(1000).seconds == 1e-6


def test_a_glitch_is_left_out_and_a_step_is_not() -> None:
    smooth = [(2.0**i, 1e-6 * 2**i) for i in range(6)]
    glitch = [(x, y * (5 if x == 8 else 1)) for x, y in smooth]
    assert Curve.of(glitch).xs == (1.0, 2.0, 4.0, 16.0, 32.0)
    assert Curve.of(glitch).at(8).seconds == pytest.approx(8e-6)
    assert Curve.of(glitch).at(8).source == Source.INTERPOLATED
    step = [(x, 1e-6 if x < 8 else 3e-6) for x, _ in smooth]
    assert len(Curve.of(reversed(step)).xs) == len(step)


@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        ("collectives.csv", ("device", "op", "num_gpus", "bytes", "us", "backend"), 1980),
        ("gemm.csv", ("device", "dtype", "m", "n", "k", "us", "tflops"), 256),
    ],
)
def test_the_tables_are_whole(name: str, columns: tuple[str, ...], count: int) -> None:
    rows = read_rows(name, columns)
    assert len(rows) == count
    assert all(len(row) == len(columns) for row in rows)
    times_us = [float(row[columns.index("us")]) for row in rows]
    assert all(t > 0 and math.isfinite(t) for t in times_us)


def test_a_table_with_wrong_columns_is_refused() -> None:
    with pytest.raises(AssertionError, match="has columns device,dtype"):
        read_rows("gemm.csv", ("device", "m"))
