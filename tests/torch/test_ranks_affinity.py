"""The cores that a rank is pinned to, and the ranks and threads that fit a machine."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.presets import load_model_config
from narrows.cost.environment import num_cores
from narrows.engine.machine_fit import fit
from narrows.ranks import Launch, affinity


@given(st.integers(1, 6), st.integers(1, 4), st.sets(st.integers(0, 60), min_size=1, max_size=24))
def test_shares_fill_the_cores_or_are_empty(places: int, threads: int, allowed: set[int]) -> None:
    ordered = sorted(allowed)
    shares = [affinity.share_of(ordered, place, places, threads) for place in range(places)]
    if places * threads == len(ordered):
        assert [core for share in shares for core in share] == ordered
    else:
        assert not any(shares)


@pytest.mark.parametrize(
    ("model", "room", "dp", "expected"),
    [
        ("deepseek-v3", 2, 1, (2, 1)),
        ("deepseek-v3", 1, 1, (1, 1)),
        ("deepseek-v3", 7, 1, (4, 1)),
        ("deepseek-v3", 16, 1, (8, 2)),
        ("deepseek-v3", 16, 4, (4, 1)),
        ("deepseek-v3", 2, 4, (1, 1)),
        ("llama-3.1-8b", 64, 1, (8, 8)),
    ],
)
def test_ranks_come_before_threads(
    monkeypatch: pytest.MonkeyPatch, model: str, room: int, dp: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(affinity, "num_cores", lambda: room)
    config = load_model_config(model)
    assert fit(config, dp=dp, tp=None, threads=None, run_on="cpu", launch=None) == expected
    assert fit(config, dp=dp, tp=1, threads=None, run_on="cpu", launch=None)[1] == max(room // dp, 1)
    assert fit(config, dp=dp, tp=3, threads=5, run_on="cpu", launch=None) == (3, 5)


def test_ranks_on_gpus_are_one_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "num_gpus", lambda: 4)
    assert fit(load_model_config("deepseek-v3"), dp=1, tp=None, threads=None, run_on="cuda", launch=None) == (4, 1)


def test_a_launch_decides_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "num_cores", lambda: 6)
    config = load_model_config("deepseek-v3")
    launch = Launch.of_nodes(world_size=4, num_nodes=2, node=0, address="10.0.0.1", port=1)
    assert fit(config, dp=1, tp=None, threads=None, run_on="cpu", launch=launch) == (4, 3)
    assert fit(config, dp=2, tp=None, threads=None, run_on="cpu", launch=launch) == (2, 3)
    started = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launch = Launch.of_torchrun(started | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, world_size=None)
    assert launch is not None and launch.world_size == 8
    assert fit(config, dp=2, tp=None, threads=None, run_on="cpu", launch=launch) == (4, 3)


def test_a_rank_is_pinned() -> None:
    before = os.sched_getaffinity(0)
    try:
        one = min(before)
        os.sched_setaffinity(0, {one})
        assert num_cores() == 1 and affinity.pin(0, 1, 1) == (one,) and affinity.pin(0, 2, 1) == ()
    finally:
        os.sched_setaffinity(0, before)
