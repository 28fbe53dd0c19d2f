"""Phases of a start add up to the time since the process began, and parts of ranks are not counted twice."""

from __future__ import annotations

import time

from narrows.ranks.start_clock import StartClock, _age_s


def test_phases_follow_each_other_from_the_beginning_of_the_process() -> None:
    before = _age_s()
    clock = StartClock()
    clock.end("imports")
    time.sleep(0.02)
    clock.end("ranks")
    clock.of_ranks("weights", 0.015)
    assert [(phase.name, phase.of_ranks) for phase in clock.phases] == [
        ("imports", False),
        ("ranks", False),
        ("weights", True),
    ]
    imports, ranks, _ = clock.phases
    assert imports.seconds >= before - 0.02 and ranks.seconds >= 0.02
    assert clock.seconds == imports.seconds + ranks.seconds


def test_the_age_of_a_process_grows_with_the_clock() -> None:
    first, start = _age_s(), time.perf_counter()
    time.sleep(0.05)
    grown, passed = _age_s() - first, time.perf_counter() - start
    assert first == 0.0 or 0 < grown <= passed + 0.02  # a clock that is not Linux's says nothing
