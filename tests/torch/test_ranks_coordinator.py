"""The coordinator's verdicts on silent ranks, by an injected clock; ranks are the other ends of connections."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from patience import eventually

from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.ranks.channel import Channel, listen
from narrows.ranks.coordinator import Coordinator
from narrows.ranks.messages import BEAT, HELLO, hello
from narrows.ranks.timing import Timing
from narrows.ranks.watchdog import Report

TIMING = Timing(beat_s=0.01, silence_s=600.0, suspended_s=200.0, grace_s=0.1)
"""Looked at a hundred times a second; the rest is in minutes of the test's clock, which no machine is too slow for."""


class Scene:
    """A coordinator of two ranks, and what the ranks do."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.coordinator = Coordinator(Mesh.of(dp=1, tp=2), 60.0, None, (), TIMING, lambda: self.now)
        self.ranks: list[Channel] = []
        key = b"k" * 32
        with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as other:
            for rank in range(2):
                there = other.submit(Channel.connect, "127.0.0.1", listener.getsockname()[1], key)
                here = Channel.accept(listener.accept()[0], key)
                there.result().send(HELLO, pickle.dumps(hello(rank, 0, os.getpid())))
                self.coordinator._admit(here)
                self.ranks.append(there.result())
        self.coordinator._start_thread(self.coordinator._tick, "narrows watches its ranks")

    def after(self, seconds: float, *beating: int) -> None:
        """Time goes on; then these ranks say that they live, and the coordinator has checked them."""
        self.now += seconds
        eventually(lambda: self.coordinator._ticked_at == self.now)
        for rank in beating:
            self.ranks[rank].send(BEAT, pickle.dumps(Report()))
            eventually(lambda rank=rank: self.coordinator.silence_s()[rank] == 0)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.coordinator.end(None)
    for channel in made.ranks:
        channel.close()


def test_a_rank_that_is_silent_for_too_long_is_named(scene: Scene) -> None:
    for _ in range(4):
        scene.after(150.0, 0)
    assert scene.coordinator.silence_s() == (0.0, 600.0) and scene.coordinator.failure is None
    scene.now += 1.0
    eventually(lambda: scene.coordinator.failure is not None)
    assert isinstance(scene.coordinator.failure, RankError)
    assert str(scene.coordinator.failure).startswith(f"rank 1 (pid {os.getpid()} on ")
    assert str(scene.coordinator.failure).endswith("): nothing was heard for 600 s")


def test_ranks_that_died_together_are_named_together(scene: Scene) -> None:
    scene.after(150.0, 0)
    for _ in range(4):
        scene.after(100.0)
    scene.now += 60.0
    eventually(lambda: scene.coordinator.failure is not None)
    assert "rank 0 (pid " in str(scene.coordinator.failure) and ", rank 1 (pid " in str(scene.coordinator.failure)


def test_a_suspended_coordinator_forgives_silence(scene: Scene) -> None:
    scene.after(150.0)
    assert scene.coordinator.silence_s() == (150.0, 150.0)
    scene.after(5000.0)
    assert scene.coordinator.silence_s() == (0.0, 0.0) and scene.coordinator.failure is None
