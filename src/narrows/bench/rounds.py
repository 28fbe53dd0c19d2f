"""Runs several ways of doing something in turns. Knows callables and what they give; not what is measured. PURE."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

__all__ = ["in_turns"]

Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")


def in_turns(
    ways: Mapping[Name, Callable[[], T]],
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Name, list[T]]:
    """What each way gave in each round; those of the first ``warmup`` rounds are dropped.

    Every round begins with another way, so that none is always the one that runs after another.
    """
    names = list(ways)
    given: dict[Name, list[T]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:
            progress(f"{'warm-up' if turn < warmup else f'round {turn - warmup + 1} of {rounds}'}: {name}")
            one = ways[name]()
            if turn >= warmup:
                given[name].append(one)
    return given
