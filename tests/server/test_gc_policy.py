"""Full collections of garbage run between requests, and under load only once in a long while."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from narrows.server.gc_policy import FullCollections


@dataclass
class Interpreter:
    """Counts what is asked of it."""

    young: int = 0
    full: int = 0

    def collect(self) -> None:
        self.full += 1
        self.young += 1  # a full collection may count as one of young objects

    def num_young(self) -> int:
        return self.young


def test_full_collections_wait_for_a_moment_without_requests() -> None:
    interpreter = Interpreter()
    collections = FullCollections(interpreter.collect, interpreter.num_young)
    for _ in range(100):
        interpreter.young += 1
        collections.look(busy=True)
    assert interpreter.full == 0
    collections.look(busy=False)
    assert interpreter.full == 1
    collections.look(busy=False)
    assert interpreter.full == 1, "nothing was made since"


def test_load_without_pauses_still_frees_its_cycles() -> None:
    interpreter = Interpreter()
    collections = FullCollections(interpreter.collect, interpreter.num_young)
    for _ in range(10_000):
        interpreter.young += 1
        collections.look(busy=True)
    assert 1 <= interpreter.full <= 10


def test_automatic_collections_leave_old_objects_alone() -> None:
    thresholds = gc.get_threshold()
    try:
        FullCollections.begin()
        before = gc.get_stats()[2]["collections"]
        kept = [[number] for number in range(300_000)]  # enough for dozens of collections of young objects
        assert len(kept) == 300_000
        assert gc.get_stats()[2]["collections"] == before
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    began = gc.get_stats()[1]["collections"]
    kept = [[number] for number in range(300_000)]
    assert gc.get_stats()[1]["collections"] > began
