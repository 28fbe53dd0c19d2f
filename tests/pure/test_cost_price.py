"""Prices add, scale and say how well they are known; importing the room costs little and reads no table."""

import doctest
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import narrows.cost
from narrows.cost import ZERO, Price, Source, price

seconds = st.floats(min_value=0.0, max_value=1e3)
prices = st.builds(Price, seconds, st.sampled_from(Source))


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(price).failed == 0


def test_sources_are_ordered_from_strong_to_weak_and_have_labels() -> None:
    assert [source.label for source in sorted(Source)] == ["measured", "interpolated", "scaled", "roofline"]


@settings(deadline=None)
@given(prices, prices)
def test_a_sum_has_the_seconds_of_both_and_the_weaker_source(a: Price, b: Price) -> None:
    assert (a + b).seconds == a.seconds + b.seconds
    assert (a + b).source == max(a.source, b.source)


@settings(deadline=None)
@given(prices)
def test_zero_changes_nothing(a: Price) -> None:
    assert a + ZERO == a == ZERO + a
    assert sum([a, a], ZERO) == a.times(2)


def test_times() -> None:
    assert Price(2e-6, Source.SCALED).times(61) == Price(2e-6 * 61, Source.SCALED)
    assert Price(2e-6, Source.SCALED).times(0.5) == Price(1e-6, Source.SCALED)
    assert Price(2e-6, Source.ROOFLINE).times(0) == ZERO


@settings(deadline=None)
@given(st.lists(prices, max_size=20), st.randoms())
def test_picoseconds_are_whole_and_their_sum_has_no_order(found: list[Price], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sum(p.ps for p in found) == sum(p.ps for p in shuffled)
    assert all(abs(p.ps - p.seconds * 1e12) <= max(0.5, p.seconds * 1e-3) for p in found)


def test_picoseconds_round_to_nearest() -> None:
    assert Price(1.6e-12, Source.MEASURED).ps == 2
    assert Price(20.13e-6, Source.MEASURED).ps == 20_130_000


def test_a_price_is_frozen_and_travels_between_processes() -> None:
    found = Price(1e-6, Source.SCALED)
    with pytest.raises(AttributeError):
        found.seconds = 2.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(found)) == found


def test_every_public_name_exists() -> None:
    assert sorted(narrows.cost.__all__, key=lambda name: (not name.isupper(), name)) == list(narrows.cost.__all__)
    assert all(hasattr(narrows.cost, name) for name in narrows.cost.__all__)


def test_importing_reads_no_table_and_no_heavy_library() -> None:
    code = """
import sys
import narrows.cost
import narrows.cost.collectives as c, narrows.cost.gemm as g
assert c._curves.cache_info().currsize == g._tables.cache_info().currsize == 0
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
