"""The published H20 profile, priced: DeepSeek-V3 in FP8, TP8, one step of 32,768 rows, 61 layers.

The figures are the reference's prices with the same conventions, and the published ones.
"""

import pytest

from narrows.cost import Price, Source, collective_price, device, gemm_price, norm_price

H20 = device("h20")
ROWS, HIDDEN, QKV_A, LATENTS, LAYERS, TP = 32_768, 7168, 2112, 1536 + 512, 61, 8
WIDE = ROWS * HIDDEN * 2  # bytes of the residual stream


def ms(found: Price) -> float:
    return found.seconds * 1e3


def test_qkv_a_projection() -> None:
    before = gemm_price(H20, ROWS, QKV_A, HIDDEN, "fp8").times(LAYERS)
    after = gemm_price(H20, ROWS // TP, QKV_A, HIDDEN, "fp8").times(LAYERS)
    assert ms(before) == pytest.approx(211, rel=0.015)
    assert ms(after) == pytest.approx(26.7, rel=0.015)
    assert ms(before) == pytest.approx(205.1, rel=0.035)  # published
    assert ms(after) == pytest.approx(26.14, rel=0.035)


def test_communication() -> None:
    reduce = collective_price(H20, "all_reduce", TP, WIDE)
    scatter = collective_price(H20, "reduce_scatter", TP, WIDE)
    narrow = collective_price(H20, "all_gather", TP, ROWS * QKV_A * 2)
    before = reduce.times(2 * LAYERS + 1)
    after = reduce.times(LAYERS + 1) + scatter.times(LAYERS) + narrow.times(LAYERS)
    assert ms(before) == pytest.approx(258.1, rel=0.015)
    assert ms(after) == pytest.approx(242.7, rel=0.015)
    assert ms(before) - ms(after) == pytest.approx(15.4, rel=0.05)
    assert ms(before) == pytest.approx(267.1, rel=0.04)  # published
    assert ms(after) == pytest.approx(249.63, rel=0.04)
    assert before.source == after.source == Source.SCALED
    # A gather of the full width instead would cost about 16 % more than no change at all.
    wide = reduce.times(LAYERS + 1) + (scatter + collective_price(H20, "all_gather", TP, WIDE)).times(LAYERS)
    assert ms(wide) / ms(before) == pytest.approx(1.16, abs=0.01)


def test_norms() -> None:
    add_norm = norm_price(H20, 4 * WIDE, fused=True)  # hidden and residual in, both out
    plain = norm_price(H20, 2 * WIDE, fused=False)
    latents = norm_price(H20, 2 * ROWS * LATENTS * 2, fused=True)
    before = add_norm.times(2 * LAYERS + 1) + latents.times(LAYERS)
    after = (norm_price(H20, 4 * WIDE / TP, fused=True) + plain + latents).times(LAYERS) + add_norm
    assert ms(before) == pytest.approx(83.0, rel=0.015)
    assert ms(after) == pytest.approx(44.0, rel=0.015)
    assert ms(before) == pytest.approx(82.303, rel=0.02)  # published
    assert ms(after) == pytest.approx(43.398, rel=0.02)
