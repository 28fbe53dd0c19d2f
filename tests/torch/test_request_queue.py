"""The queue hands requests to the loop in rounds of a bounded size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from narrows.api import Generation, Update
from narrows.engine.core import Engine
from narrows.service.queue import RequestQueue


def _ignore(update: Update) -> None:
    """Nobody waits for this request."""


def _queue() -> RequestQueue:
    queue = RequestQueue(10_000, lambda: None)
    engine: Any = SimpleNamespace(request=lambda generation: SimpleNamespace(generation=generation))
    queue.open(cast(Engine, engine))
    return queue


def _numbers(requests: list[Any]) -> list[int]:
    return [each.number for each in requests]


def test_a_thousand_requests_come_to_the_loop_in_rounds() -> None:
    queue = _queue()
    numbers = [queue.submit(Generation(prompt=(1,), max_tokens=1), _ignore) for _ in range(1000)]
    rounds = []
    while queue.num_arrived:
        arrived, unwanted = queue.take(32)
        assert not unwanted
        rounds.append(_numbers(arrived))
    assert max(map(len, rounds)) == 32
    assert [number for each in rounds for number in each] == numbers


def test_a_thousand_aborts_come_to_the_loop_in_rounds() -> None:
    queue = _queue()
    numbers = [queue.submit(Generation(prompt=(1,), max_tokens=1), _ignore) for _ in range(1000)]
    queue.take(1000)
    for number in numbers:
        queue.abort(number)
        queue.abort(number)  # a second time changes nothing
    rounds = []
    while unwanted := queue.take(32)[1]:
        rounds.append(_numbers(unwanted))
    assert max(map(len, rounds)) == 32
    assert [number for each in rounds for number in each] == numbers
    assert queue.drain(0.0), "a request that nobody waits for is still there"


def test_a_request_is_taken_before_its_abort() -> None:
    queue = _queue()
    numbers = [queue.submit(Generation(prompt=(1,), max_tokens=1), _ignore) for _ in range(5)]
    queue.abort(numbers[4])
    queue.abort(numbers[0])
    taken: list[int] = []
    for _ in range(5):
        arrived, unwanted = queue.take(2)
        taken += _numbers(arrived)
        assert set(_numbers(unwanted)) <= set(taken)
        if numbers[4] in _numbers(unwanted):
            return
    pytest.fail("the abort of a request that came late was lost")
