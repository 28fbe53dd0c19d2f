"""Clocks of ranks with waits in them, and the work that was behind: from simulated cores, and in general."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.calibrate.wait_attribution import attribute_waits

SECONDS = st.floats(0.0, 10.0)


@st.composite
def executions(draw: st.DrawFn) -> tuple[list[list[float]], list[bool]]:
    """Clocks of one to four ranks around the same steps."""
    num = draw(st.integers(1, 8))
    is_collective = draw(st.lists(st.booleans(), min_size=num, max_size=num))
    times = st.lists(SECONDS, min_size=num, max_size=num)
    return draw(st.lists(times, min_size=1, max_size=4)), is_collective


@given(executions(), st.floats(1, 4))
def test_no_time_is_lost_or_made(execution: tuple[list[list[float]], list[bool]], at_once: float) -> None:
    ranks, is_collective = execution
    found = attribute_waits(ranks, is_collective, at_once)
    last = max((at + 1 for at, met in enumerate(is_collective) if met), default=0)
    assert min(found) >= 0
    assert sum(found[:last]) == pytest.approx(sum(sum(times[:last]) for times in ranks) / len(ranks))
    assert sum(found[last:]) == pytest.approx(max(sum(times[last:]) for times in ranks))


@given(executions(), st.floats(1, 4))
def test_the_order_of_ranks_does_not_matter(execution: tuple[list[list[float]], list[bool]], at_once: float) -> None:
    ranks, is_collective = execution
    assert attribute_waits(ranks[::-1], is_collective, at_once) == pytest.approx(
        attribute_waits(ranks, is_collective, at_once)
    )


@given(st.lists(SECONDS, min_size=1, max_size=8), st.data())
def test_equal_ranks_on_cores_of_their_own_have_no_waits(times: list[float], data: st.DataObject) -> None:
    is_collective = data.draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times)))
    assert attribute_waits([times, times], is_collective, 2) == pytest.approx(times)


def clocks(work: list[list[float]], exchange: float, cores: int) -> list[list[float]]:
    """Clocks of ranks that work ``work[rank][round]`` seconds in each round and then exchange for ``exchange`` seconds.

    Rank r runs on core r % cores, after earlier ranks there. A rank that waits for a core has not read its clock yet,
    so its exchange seems to last."""
    ready, ends = 0.0, [0.0] * len(work)
    out: list[list[float]] = [[] for _ in work]
    for turn in range(len(work[0])):
        free = [ready] * cores
        came = []
        for rank, seconds in enumerate(work):
            begins = free[rank % cores]
            if turn:
                out[rank].append(begins - ends[rank])
            free[rank % cores] = ends[rank] = begins + seconds[turn]
            out[rank].append(seconds[turn])
            came.append(ends[rank])
        ready = max(came) + exchange
    for rank in range(len(work)):
        out[rank].append(ready - ends[rank])
    return out


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_waits_on_shared_cores_are_charged_to_stages(cores: int) -> None:
    rounds, exchange = 400, 2.0
    all_work = [1.0] * rounds
    for work, takes in (([all_work] * 4, 4 / cores), ([all_work, *[[0.0] * rounds] * 3], 1.0)):
        is_collective = [False, True] * rounds
        found = attribute_waits(clocks(work, exchange, cores), is_collective, cores)
        worked, met = found[::2], found[1::2]
        middle = slice(1, -1)  # the first round has no exchange before it in which a late rank waits
        assert sum(worked[middle]) / (rounds - 2) == pytest.approx(takes, rel=0.01)
        assert sum(met[middle]) / (rounds - 2) == pytest.approx(exchange, rel=0.01)
