"""Norms, element-wise work and attention: rooflines with the stated efficiencies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cost import DEVICES, ZERO, Source, device, norm_price, stream_price
from narrows.cost.kernels import attention_roofline

H20 = device("h20")
names = st.sampled_from(sorted(DEVICES))


def test_norms() -> None:
    fused, plain = norm_price(H20, 4e9, fused=True), norm_price(H20, 2e9, fused=False)
    assert fused.seconds == pytest.approx(4e9 / (0.75 * 4.0e12) + 3e-6)
    assert plain.seconds == pytest.approx(2e9 / (0.44 * 4.0e12) + 3e-6)
    assert fused.source == plain.source == Source.ROOFLINE


def test_a_stream() -> None:
    found = stream_price(H20, 3e9)
    assert found.seconds == pytest.approx(3e9 / (0.75 * 4.0e12) + 3e-6)
    assert found.source == Source.ROOFLINE


def test_attention_is_bound_by_compute_or_by_the_cache() -> None:
    compute = attention_roofline(H20, flops=1e12, kv_bytes=1e6, dtype="bf16")
    assert compute.seconds == pytest.approx(1e12 / (0.85 * 148e12) + 3e-6)
    memory = attention_roofline(H20, flops=1e9, kv_bytes=1e9, dtype="bf16")
    assert memory.seconds == pytest.approx(1e9 / (0.75 * 4.0e12) + 3e-6)
    assert compute.source == memory.source == Source.ROOFLINE
    # An FP8 cache is read faster because it is smaller, not computed faster.
    assert attention_roofline(H20, flops=1e12, kv_bytes=1e6, dtype="fp8") == compute
    assert attention_roofline(H20, flops=1e12, kv_bytes=1e6, dtype="fp32").seconds > 3 * compute.seconds


def test_nothing_costs_nothing() -> None:
    for found in DEVICES.values():
        assert norm_price(found, 0, fused=True) == norm_price(found, 0, fused=False) == ZERO
        assert stream_price(found, 0) == ZERO
        assert attention_roofline(found, flops=0, kv_bytes=0, dtype="bf16") == ZERO


@settings(deadline=None)
@given(names, st.floats(1, 1e10), st.floats(1.0, 8.0))
def test_more_bytes_cost_more(name: str, nbytes: float, factor: float) -> None:
    found = device(name)
    for fused in (True, False):
        assert norm_price(found, nbytes, fused=fused).seconds <= norm_price(found, nbytes * factor, fused=fused).seconds
    assert stream_price(found, nbytes).seconds <= stream_price(found, nbytes * factor).seconds
    assert stream_price(found, nbytes).seconds > nbytes / found.hbm_bytes_per_s


def test_less_than_nothing_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="moves -1 bytes"):
        stream_price(H20, -1)
    with pytest.raises(AssertionError, match="-5 flops"):
        attention_roofline(H20, flops=-5, kv_bytes=0, dtype="bf16")
