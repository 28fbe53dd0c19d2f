"""GEMM prices: the points of the tables, other shapes and devices, and the experts' grouped GEMM."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from narrows.cost import DEVICES, ZERO, Source, device, gemm_price, grouped_gemm_price
from narrows.cost.gemm import _tables
from narrows.cost.grids import grids
from narrows.cost.price import Curve
from narrows.errors import ConfigError

SHAPES = ((256, 7168), (1536, 7168), (2048, 7168), (4096, 7168), (4096, 512), (3072, 1536), (7168, 2048), (7168, 16384))
GRIDS = ("h100", "h200", "b200", "gb200", "a100")
FP8 = [name for name, found in DEVICES.items() if found.tflops_fp8 is not None]


def us(name: str, m: int, n: int, k: int, dtype: str) -> float:
    return gemm_price(device(name), m, n, k, dtype).seconds * 1e6


def roofline_us(name: str, m: int, n: int, k: int, dtype: str) -> float:
    found, width = device(name), {"bf16": 2, "fp8": 1, "fp32": 4}[dtype]
    traffic = (m * k + n * k) * width + m * n * max(width, 2)
    return max(2 * m * n * k / found.flops_per_s(dtype), traffic / found.hbm_bytes_per_s) * 1e6


@pytest.mark.parametrize(
    ("name", "m", "n", "k", "dtype", "expected"),
    [
        ("h100", 4096, 2048, 7168, "bf16", 150.6),
        ("h100", 4096, 2048, 7168, "fp8", 123.2),  # with scales by block
        ("h200", 1, 65536, 51200, "fp8", 882.9),
        ("h200", 1, 65536, 51200, "fp8-tensor", 748),
        ("l40s", 1, 4096, 512, "fp8", None),  # no block-scaled points there: one scale per tensor
        ("a100", 16384, 256, 2560, "bf16", 136.9),
    ],
)
def test_a_point_of_the_table_is_measured(
    name: str, m: int, n: int, k: int, dtype: str, expected: float | None
) -> None:
    found = gemm_price(device(name), m, n, k, dtype)
    assert found.source == Source.MEASURED
    if expected is not None:
        assert found.seconds == pytest.approx(expected * 1e-6)


def test_between_and_above_the_points() -> None:
    between = gemm_price(device("h100"), 6000, 2048, 7168, "bf16")
    assert between.source == Source.INTERPOLATED
    assert 150.6e-6 < between.seconds < 299.3e-6
    above = gemm_price(device("h100"), 32768, 2048, 7168, "bf16")
    assert above.source == Source.SCALED
    assert above.seconds == pytest.approx((615.6 + 2 * (615.6 - 299.3)) * 1e-6)


def test_a_glitch_of_the_sweep_does_not_decide() -> None:
    # 10 us between 2 and 3 is a fault of the sweep.
    assert Curve.of([(1, 2e-6), (2, 10e-6), (4, 3e-6)]).xs == (1, 4)


def test_weights_that_fit_the_cache_in_the_sweep_are_priced_from_memory() -> None:
    # 7168 x 2048 in FP8 took the L40S 7.4 us at one row, which is 2 TB/s from a memory of 0.864.
    found = gemm_price(device("l40s"), 1, 7168, 2048, "fp8")
    assert found.source == Source.ROOFLINE
    assert found.seconds == pytest.approx(7168 * 2048 / 0.864e12, rel=0.01)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 100_000),
    st.sampled_from([*SHAPES, (2112, 7168), (16160, 7168), (100, 100)]),
    st.sampled_from(["bf16", "fp8", "fp32"]),
)
def test_nothing_is_faster_than_its_roofline(name: str, m: int, shape: tuple[int, int], dtype: str) -> None:
    if dtype != "fp8" or name in FP8:
        assert us(name, m, *shape, dtype) >= roofline_us(name, m, *shape, dtype) * (1 - 1e-9)


def test_no_rows_cost_nothing() -> None:
    for found in DEVICES.values():
        assert gemm_price(found, 0, 2112, 7168, "bf16") == ZERO
        assert grouped_gemm_price(found, 0, 32.0, 4096, 7168, "bf16") == ZERO


@pytest.mark.parametrize("name", (*GRIDS, "l40s"))
@pytest.mark.parametrize("m", [1, 32, 512, 3000, 16384])
def test_a_shape_next_to_a_measured_one_costs_nearly_as_much(name: str, m: int) -> None:
    for n, k in SHAPES:
        beside = gemm_price(device(name), m, n + 1, k, "bf16")
        assert beside.source == (Source.SCALED if name == "l40s" else Source.INTERPOLATED)
        assert beside.seconds * 1e6 == pytest.approx(us(name, m, n, k, "bf16"), rel=0.03)


@settings(deadline=None)
@given(
    st.sampled_from(GRIDS),
    st.sampled_from((1, 4, 64, 1024, 16384)),
    st.integers(256, 65536),
    st.integers(256, 65536),
    st.sampled_from(["bf16", "fp8", "fp8-tensor"]),
)
def test_a_shape_of_the_grid_lies_between_its_neighbours(name: str, m: int, n: int, k: int, dtype: str) -> None:
    if name == "a100":
        dtype = "bf16"
    grid = grids(name, {"bf16": "gemm_bf16", "fp8": "gemm_fp8_block", "fp8-tensor": "gemm_fp8"}[dtype])[()]
    corners = [
        grid.curves[a, b].at(m).seconds * 1e6
        for a in _around(grid.axes[0], n)
        for b in _around(grid.axes[1], k)
        if (a, b) in grid.curves
    ]
    assume(corners)  # the largest shapes are no weights of any model, and were not measured
    floor = roofline_us(name, m, n, k, "fp8" if dtype == "fp8-tensor" else dtype)
    assert max(min(corners), floor) * (1 - 1e-9) <= us(name, m, n, k, dtype) <= max(*corners, floor) * (1 + 1e-9)


def _around(axis: tuple[int, ...], value: int) -> tuple[int, int]:
    return max(x for x in axis if x <= value), min(x for x in axis if x >= value)


def test_a_shape_beyond_the_grid_costs_in_proportion() -> None:
    at_its_edge, beyond = (us("h200", 8192, 16384, k, "bf16") for k in (65536, 131072))
    assert beyond == pytest.approx(2 * at_its_edge, rel=0.05)


def test_a_tiny_gemm_still_costs_a_launch() -> None:
    assert us("h100", 1, 64, 64, "bf16") == pytest.approx(3.106)
    assert us("h20", 1, 64, 64, "bf16") == pytest.approx(5.7, abs=0.05)


def test_without_a_table_it_is_a_roofline() -> None:
    h20 = gemm_price(device("h20"), 32768, 2112, 7168, "fp8")
    assert h20.source == Source.ROOFLINE
    assert h20.seconds == pytest.approx(2 * 32768 * 2112 * 7168 / (0.97 * 296e12) + 5.7e-6)
    one_row = gemm_price(device("h20"), 1, 2112, 7168, "bf16").seconds
    assert one_row == pytest.approx(2 * 2112 * 7168 / (0.6 * 4.0e12) + 5.7e-6, rel=2e-3)


def test_the_same_chip_lends_its_times() -> None:
    h800 = gemm_price(device("h800"), 4096, 2048, 7168, "bf16")
    assert h800.source == Source.SCALED
    assert h800.seconds * 1e6 == pytest.approx(150.6)


def test_float32_is_a_roofline_everywhere() -> None:
    router = gemm_price(device("h100"), 32768, 256, 7168, "fp32")
    assert router.source == Source.ROOFLINE
    assert router.seconds == pytest.approx(2 * 32768 * 256 * 7168 / (0.8 * 67e12) + 5.7e-6)
    assert router.seconds > 10 * gemm_price(device("h100"), 32768, 256, 7168, "bf16").seconds


def test_fp8_on_a_device_without_it_is_an_error() -> None:
    for name in ("a100", "cpu-core", "xeon-8480"):
        with pytest.raises(ConfigError, match=f"{name} .* has no fp8 arithmetic; use bf16"):
            gemm_price(device(name), 8, 2112, 7168, "fp8")
        with pytest.raises(ConfigError, match="no fp8"):
            grouped_gemm_price(device(name), 8, 32.0, 4096, 7168, "fp8")
    with pytest.raises(ConfigError, match="has no price for int8"):
        gemm_price(device("h100"), 8, 2112, 7168, "int8")


@settings(deadline=None)
@given(st.sampled_from(sorted(DEVICES)), st.integers(1, 4096), st.sampled_from(["bf16", "fp32"]))
def test_eight_times_the_rows_never_cost_less(name: str, m: int, dtype: str) -> None:
    # Points of the sweep scatter by tens of per cent, so that one row more may seem cheaper.
    assert us(name, 8 * m, 2112, 7168, dtype) >= 0.75 * us(name, m, 2112, 7168, dtype)


def test_the_tables_have_the_shapes_that_these_tests_name() -> None:
    assert {name for name, _ in _tables()} == {"l40s"}
    assert all(set(shapes) == set(SHAPES) for shapes in _tables().values())


# The experts' grouped GEMM.


def test_few_pairs_read_few_experts() -> None:
    # 2 pairs on 32 experts touch 1.97 in expectation: two of 4096 x 7168, nearly.
    two = grouped_gemm_price(device("h20"), 2, 32.0, 4096, 7168, "fp8").seconds
    touched = 32 * (1 - (31 / 32) ** 2)
    each = 4096 * 7168 / (0.6 * 4.0e12)
    assert two == pytest.approx(touched * each + 5.7e-6, rel=0.01)
    all_experts = grouped_gemm_price(device("h20"), 2000, 32.0, 4096, 7168, "fp8").seconds
    assert all_experts > 10 * two


def test_one_expert_is_one_gemm() -> None:
    for name in ("h20", "h100", "b200", "cpu-core"):
        for pairs in (1, 64, 4096):
            grouped = grouped_gemm_price(device(name), pairs, 1.0, 4096, 7168, "bf16").seconds
            assert grouped == pytest.approx(gemm_price(device(name), pairs, 4096, 7168, "bf16").seconds, rel=0.35)


@pytest.mark.parametrize("name", ["h20", "h100", "b200", "a100", "mi300x", "cpu-core"])
def test_many_pairs_cost_the_sum_of_their_experts(name: str) -> None:
    grouped = grouped_gemm_price(device(name), 32 * 1024, 32.0, 4096, 7168, "bf16").seconds
    apart = 32 * gemm_price(device(name), 1024, 4096, 7168, "bf16").seconds
    together = gemm_price(device(name), 32 * 1024, 4096, 7168, "bf16").seconds
    assert min(0.8 * apart, 0.99 * together) <= grouped <= 1.01 * apart
    # And no more than they would at the peak, nor less.
    assert grouped >= 2 * 32 * 1024 * 4096 * 7168 / device(name).flops_per_s("bf16")


def test_grouped_sources() -> None:
    assert grouped_gemm_price(device("h100"), 4096, 32.0, 4096, 7168, "fp8").source == Source.SCALED
    assert grouped_gemm_price(device("h20"), 4096, 32.0, 4096, 7168, "fp8").source == Source.ROOFLINE


def test_less_than_one_expert_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 experts on a rank.*fewer ranks"):
        grouped_gemm_price(device("h100"), 8, 0.5, 4096, 7168, "bf16")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 100_000),
    st.floats(1.0, 512.0),
    st.sampled_from([(4096, 7168), (512, 7168), (7168, 256)]),
)
def test_a_grouped_gemm_lies_between_its_rooflines(
    name: str, pairs: int, experts: float, shape: tuple[int, int]
) -> None:
    found, (n, k) = device(name), shape
    seconds = grouped_gemm_price(found, pairs, experts, n, k, "bf16").seconds
    touched = experts * (1 - (1 - 1 / experts) ** pairs)
    assert math.isfinite(seconds)
    assert seconds >= 2 * pairs * n * k / found.flops_per_s("bf16") * 0.999
    assert seconds >= touched * 2 * n * k / found.hbm_bytes_per_s * 0.999
    single = gemm_price(found, max(1, math.ceil(pairs / touched)), n, k, "bf16").seconds
    assert seconds <= 2 * (touched + 1) * single


def test_a_price_is_the_same_when_computed_twice() -> None:
    assert gemm_price(device("h100"), 77, 2112, 7168, "fp8") is gemm_price(device("h100"), 77, 2112, 7168, "fp8")
    args = (device("h100"), 77, 32.0, 4096, 7168, "fp8")
    assert grouped_gemm_price(*args) is grouped_gemm_price(*args)


@pytest.mark.parametrize("name", [name for name in FP8 if name != "l40s"])  # there the sweep says it is not
def test_fp8_is_worth_it_for_many_rows(name: str) -> None:
    assert us(name, 16384, 4096, 7168, "fp8") < 0.8 * us(name, 16384, 4096, 7168, "bf16")


def test_a_grouped_gemm_costs_at_most_one_gemm_of_its_tiles() -> None:
    h100 = device("h100")
    grouped = grouped_gemm_price(h100, 131072, 256.0, 512, 7168, "fp8").seconds
    assert grouped <= 1.01 * gemm_price(h100, 131072, 512, 7168, "fp8").seconds
