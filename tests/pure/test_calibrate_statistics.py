"""Medians, spreads, turns and rooflines of `narrows bench`, against other people's formulas and counts by hand."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.bench.interleave import interleave, turn_order
from narrows.bench.results import Series
from narrows.bench.roofline import decode_bound, decode_kv_bytes, decode_weight_bytes, prefill_flops
from narrows.calibrate.statistics import median_interval, quantile, ratios, spread
from narrows.cost.memory import weight_bytes
from narrows.layout import Mesh

POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(POSITIVE, min_size=2))
def test_spread_is_the_standard_librarys(values: list[float]) -> None:
    found = spread(values)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    assert found.median == pytest.approx(statistics.median(values))
    assert (found.p10, found.p90) == pytest.approx((tenths[0], tenths[8]))
    assert found.count == len(values)


@given(st.lists(POSITIVE, min_size=1, max_size=40), st.floats(0.5, 0.99))
def test_the_interval_of_a_median_is_the_narrowest_of_coins(values: list[float], confidence: float) -> None:
    low, high = median_interval(values, confidence)
    assert low <= quantile(values, 0.5) <= high
    ordered, n = sorted(values), len(values)

    def covers(k: int) -> float:
        """The chance that at least k + 1 of n coins show heads, and at least k + 1 tails."""
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    good = [k for k in range((n + 1) // 2) if covers(k) >= confidence]
    wanted = max(good, default=0)
    assert (low, high) == (ordered[wanted], ordered[n - 1 - wanted])


def test_one_value_is_its_own_spread() -> None:
    assert quantile([3.0], 0.1) == quantile([3.0], 0.9) == 3.0


@given(st.lists(st.tuples(POSITIVE, POSITIVE, st.floats(0.1, 10)), min_size=1))
def test_a_slow_round_does_not_change_a_ratio(rounds: list[tuple[float, float, float]]) -> None:
    quiet = ratios([a for a, _, _ in rounds], [b for _, b, _ in rounds])
    noisy = ratios([a * slow for a, _, slow in rounds], [b * slow for _, b, slow in rounds])
    assert noisy.median == pytest.approx(quiet.median)


def test_variants_alternate_and_none_is_always_first() -> None:
    ran: list[str] = []

    def way(name: str) -> int:
        ran.append(name)
        return len(ran)

    found = interleave({name: lambda name=name: way(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(ran) == "abccbabcaacb"
    assert found == {"a": [6, 9, 10], "b": [5, 7, 12], "c": [4, 8, 11]}


@pytest.mark.parametrize("num", range(1, 9))
def test_every_variant_follows_every_other_equally_often(num: int) -> None:
    rounds = [turn_order(num, turn) for turn in range(2 * num)]
    assert all(sorted(order) == list(range(num)) for order in rounds)
    assert Counter(order[0] for order in rounds) == dict.fromkeys(range(num), 2)
    pairs = Counter(pair for order in rounds for pair in pairwise(order))
    assert pairs == {(a, b): 2 for a in range(num) for b in range(num) if a != b}


@pytest.mark.parametrize(("cost", "rounds"), [(1.0, 10), (3.0, 3), (50.0, 3), (2.6, 4)])
def test_only_cheap_rounds_are_repeated_within_the_time_limit(cost: float, rounds: int) -> None:
    now = 0.0

    def way() -> float:
        nonlocal now
        now += cost / 2
        return now

    found = interleave({"a": way, "b": way}, rounds=3, warmup=2, seconds=10.5, clock=lambda: now)
    assert {name: len(given) for name, given in found.items()} == {"a": rounds, "b": rounds}


def test_ratios_of_a_series_are_to_its_first_variant() -> None:
    series = Series(work="w", unit="ms", values={"a": (1.0, 2.0, 4.0), "b": (2.0, 4.0, 80.0), "c": (3.0,)})
    assert [series.ratio(name).median for name in "ab"] == [1.0, 2.0]
    assert series.ratio("c").median == 1.5, "of the medians, where rounds differ in number"
    nothing = Series(work="w", unit="ms", values={"a": (0.0,), "b": (1.0,)})
    assert nothing.ratio("b") is None
    assert nothing.document()["variants"]["b"]["ratio_to_first"] is None


def test_flops_of_a_dense_prompt_by_hand() -> None:
    llama, length = preset("llama-3.1-8b"), 100
    hidden, inner, heads, kv_heads, dim = 4096, 14336, 32, 8, 128
    products = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * inner
    pairs = length * (length + 1) // 2
    layer = 2 * length * products + 2 * pairs * heads * 2 * dim
    assert prefill_flops(llama, length) == 32 * layer + 2 * 128256 * hidden


def test_flops_of_a_routed_prompt_count_the_experts_that_a_row_takes() -> None:
    config = preset("dsv3-mini")
    hidden, length = 1024, 512
    attention = hidden * (384 + 576) + 384 * 16 * 192 + 512 * 16 * 256 + 16 * 128 * hidden
    moe = hidden * 32 + 3 * hidden * 256 * (4 + 1)
    products = 12 * attention + 11 * moe + 3 * hidden * 2816
    pairs = length * (length + 1) // 2
    assert prefill_flops(config, length) == 2 * length * products + 12 * 2 * pairs * 16 * 320 + 2 * 32000 * hidden


@pytest.mark.parametrize("name", ["dsv3-mini", "dsv2-mini", "llama-3.1-8b", "qwen3-30b-a3b"])
def test_a_step_that_hits_every_expert_reads_all_weights_but_the_embedding(name: str) -> None:
    config = preset(name)
    every = 0
    if config.moe is not None:
        every = config.moe.n_routed_experts * sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    whole = weight_bytes(config, Mesh.of(dp=1, tp=1), WeightSharding(), "bf16", 0)
    embedding = 2 * config.vocab_size * config.hidden_size
    read = decode_weight_bytes(config, 2, rows=3, experts_hit=every)
    assert read == whole - embedding + 2 * 3 * config.hidden_size


@pytest.mark.parametrize("dtype", ["int8", "int8-weight-only"])
def test_int8_weights_are_half_the_bytes_except_unquantised_ones(dtype: str) -> None:
    config, mesh = preset("dsv3-mini"), Mesh.of(dp=1, tp=1)
    every = config.moe.n_routed_experts * 11  # type: ignore[union-attr]
    wide, held = (weight_bytes(config, mesh, WeightSharding(), name, 0) for name in ("bf16", dtype))
    read = [decode_weight_bytes(config, 2, rows=0, experts_hit=every, int8=int8) for int8 in (False, True)]
    stays = 2 * 2 * config.vocab_size * config.hidden_size + 12 * 2 * 16 * 256 * 512  # embedding, head, kv_b_proj
    assert held == pytest.approx(stays + (wide - stays) / 2, rel=0.02)
    assert read[0] - read[1] == pytest.approx(wide - held, rel=0.02)


def test_fewer_experts_are_fewer_bytes() -> None:
    config = preset("dsv3-mini")
    one, two = (decode_weight_bytes(config, 2, rows=1, experts_hit=hit) for hit in (44, 45))
    assert two - one == 2 * 3 * 1024 * 256


def test_a_decode_step_is_bound_by_bytes_or_by_flops_product_by_product() -> None:
    llama, rows, context, hidden = preset("llama-3.1-8b"), 16, 10, 4096
    weights = 32 * (hidden * (32 + 2 * 8) * 128 + hidden * 32 * 128 + 3 * hidden * 14336) + 128256 * hidden
    keys, scores = 32 * rows * context * 2 * 8 * 128, 32 * rows * context * 32 * 2 * 128
    given = {"rows": rows, "context": context, "experts_hit": 0.0}
    of_memory = decode_bound(llama, 2, **given, bytes_per_s=1e3, flop_per_s=1e30)
    of_products = decode_bound(llama, 2, **given, bytes_per_s=1e30, flop_per_s=1e3)
    assert of_memory == pytest.approx(2 * (weights + keys) / 1e3, rel=1e-6)
    assert of_products == pytest.approx(2 * (rows * weights + scores) / 1e3, rel=1e-6)
    # 16 rows of a weight are 16 FLOPs a byte, 32 heads of 8 keys 4: at 8 a byte, weights are bound by products.
    both = decode_bound(llama, 2, **given, bytes_per_s=1e3, flop_per_s=8e3)
    assert both == pytest.approx(2 * rows * weights / 8e3 + 2 * keys / 1e3, rel=1e-6)


def test_the_bound_of_routed_experts_counts_used_experts_and_routed_rows() -> None:
    config, one = preset("dsv3-mini"), 2 * 3 * 1024 * 256
    hit = [
        decode_bound(config, 2, rows=4, context=1, experts_hit=hit, bytes_per_s=1e3, flop_per_s=1e30)
        for hit in (44, 55)
    ]
    assert hit[1] - hit[0] == pytest.approx(11 * one / 1e3)


def test_kv_bytes() -> None:
    assert decode_kv_bytes(preset("dsv3-mini"), 2, rows=8, context=128) == 2 * 576 * 12 * 8 * 128
    assert decode_kv_bytes(preset("llama-3.1-8b"), 2, rows=1, context=10) == 2 * 2 * 8 * 128 * 32 * 10


def test_the_middle_of_the_line() -> None:
    assert math.isclose(quantile([1.0, 2.0, 3.0, 4.0], 0.5), 2.5)
