"""Imbalance of whole experts: published figures, and the effect of ranks, rows and skew."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import comb
from random import Random
from statistics import median

import pytest

from narrows.arch.presets import preset
from narrows.arch.stages import PriceClass
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost import device
from narrows.cost import imbalance as module
from narrows.cost.imbalance import DEFAULT_SKEW, imbalance, largest_loads
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.plan.planner import Deployment, Planner

RANKS = (1, 2, 4, 8, 16, 32)
SKEWS = (0.0, 0.3, 0.6, DEFAULT_SKEW)
V3 = {"experts": 256, "top_k": 8}

# Medians for DeepSeek-V3: a power law of exponent 1.01 (NVIDIA AIConfigurator's) under many rows, and 8 rows of evenly
# random routing alone.
PUBLISHED = {2: (1.07, 1.09), 4: (1.21, 1.25), 8: (1.47, 1.50), 32: (2.49, 2.50)}


@pytest.mark.parametrize("ranks", PUBLISHED)
def test_the_figures_of_deepseek_v3(ranks: int) -> None:
    skewed, even = PUBLISHED[ranks]
    many, eight = -1, 3  # 2 ** 3 rows
    assert median(largest_loads(ranks, 256, 8, DEFAULT_SKEW)[many]) == pytest.approx(skewed, rel=0.03)
    assert median(largest_loads(ranks, 256, 8, 0.0)[eight]) == pytest.approx(even, rel=0.03)
    # A price is the mean of a layer's many draws, near the median.
    assert imbalance(ranks, 65536, **V3) == pytest.approx(skewed, rel=0.05)
    assert imbalance(ranks, 8, **V3, skew=0.0) == pytest.approx(even, rel=0.08)


def test_one_row_matches_the_exact_count() -> None:
    """8 different experts of 256 on 2 ranks of 128: the mean of the larger half is a sum of hypergeometric terms."""
    exact = sum(max(k, 8 - k) * comb(128, k) * comb(128, 8 - k) for k in range(9)) / comb(256, 8) / 4
    assert imbalance(2, 1, **V3, skew=0.0) == pytest.approx(exact, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (160, 6), (32, 4), (8, 2)])
def test_imbalance_rises_with_ranks_and_falls_with_rows(experts: int, top_k: int, skew: float) -> None:
    ranks = [n for n in RANKS if n <= experts]
    rows = [1, 2, 3, 7, 8, 50, 64, 100, 1000, 4096, 32768, 10**6]
    table = [[imbalance(n, m, experts=experts, top_k=top_k, skew=skew) for m in rows] for n in ranks]
    for line in table:
        assert line == sorted(line, reverse=True) and min(line) >= 1.0
    for fewer, more in pairwise(table):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
    assert table[0] == [1.0] * len(rows)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_imbalance_rises_with_skew(ranks: int) -> None:
    for rows in (64, 4096):
        found = [imbalance(ranks, rows, **V3, skew=skew) for skew in SKEWS]
        assert found == sorted(found) and found[0] < found[-1]


def test_even_popularity_and_many_rows_are_even() -> None:
    assert imbalance(8, 65536, **V3, skew=0.0) == pytest.approx(1.0, abs=0.01)


def test_rows_that_use_every_expert_load_all_ranks_equally() -> None:
    assert imbalance(4, 1, experts=8, top_k=8) == 1.0


def test_no_rank_gets_more_than_all_pairs() -> None:
    for rows in (1, 10, 10**5):
        assert imbalance(8, rows, experts=8, top_k=2) <= 8 / 2 + 1e-6  # one expert a rank, at most one pair of a row


def test_a_row_chooses_an_expert_once_however_popular() -> None:
    many = -1
    assert max(largest_loads(8, 8, 2, 2.0)[many]) <= 1.02 * 8 / 2


def test_ranks_with_more_experts_are_not_uneven_for_that() -> None:
    """10 experts on 4 ranks are 3, 3, 2, 2: if all are equally likely, the fullest rank has the load of its 3."""
    assert 1.0 <= imbalance(4, 65536, experts=10, top_k=2, skew=0.0) < 1.02


def test_uneven_shares_are_shares_of_the_fullest_rank() -> None:
    assert 1.0 <= imbalance(7, 65536, experts=160, top_k=6, skew=0.0) < 1.02


class Counting(Random):
    """Numbers drawn by all instances."""

    drawn = 0

    def random(self) -> float:
        Counting.drawn += 1
        return super().random()


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 8, 33, 1024, 4096, 8191, 8192])
def test_draws_are_bounded_for_the_most_experts(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A popularity of each expert in each trial, and the experts of a few rows, some of them drawn again."""
    monkeypatch.setattr(module, "Random", Counting)
    monkeypatch.setattr(Counting, "drawn", 0)
    assert len(largest_loads(2, 8192, top_k, DEFAULT_SKEW)) == 17
    assert Counting.drawn < 600_000


@pytest.mark.slow
def test_few_draws_agree_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = largest_loads(4, 2048, 512, DEFAULT_SKEW)
    monkeypatch.setattr(module, "_PAIRS", 512 << 3)
    monkeypatch.setattr(module, "_POPULARITIES", 2048 * 96)
    for few, many in zip(bounded, largest_loads(4, 2048, 512, DEFAULT_SKEW), strict=True):
        assert sum(few) / len(few) == pytest.approx(sum(many) / len(many), rel=0.02)


def experts_ps(rows: int, skew: float, experts: str, mesh: Mesh) -> int:
    deployment = Deployment(
        config=preset("deepseek-v3"), mesh=mesh, device=device("h200"), dtype="fp8", expert_skew=skew
    )
    each = rows // mesh.num_groups
    shape = StepShape.of(mesh, (each,) * mesh.num_groups, phase="prefill", context=4096)
    plan = Planner(deployment, WeightSharding(experts=experts)).plan(shape, "auto")
    return round(plan.totals()[PriceClass.EXPERTS] * 1e12)


def test_prices_of_whole_experts_depend_on_ranks_and_skew() -> None:
    eight, sixteen = Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=8)
    even, skewed = (experts_ps(16384, skew, "whole", eight) for skew in (0.0, DEFAULT_SKEW))
    assert 1.1 * even < skewed < 1.55 * even
    wide_even, wide_skewed = (experts_ps(16384, skew, "whole", sixteen) for skew in (0.0, DEFAULT_SKEW))
    assert wide_skewed / wide_even > skewed / even
    # Split experts are balanced by construction: what differs is how well their rows fill tiles.
    split, split_skewed = (experts_ps(16384, skew, "split", eight) for skew in (0.0, DEFAULT_SKEW))
    assert split_skewed < 1.2 * split


@pytest.mark.parametrize("skew", [-0.1, 4.5, float("nan")])
def test_an_impossible_skew_is_refused(skew: float) -> None:
    deployment = Deployment(config=preset("dsv3-mini"), mesh=Mesh.of(dp=1, tp=2), device=device("cpu-core"))
    with pytest.raises(ConfigError, match=r"--expert-skew is .*; it must be between 0 and 4"):
        replace(deployment, expert_skew=skew)
