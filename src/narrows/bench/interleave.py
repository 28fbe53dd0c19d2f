"""Runs the variants of a comparison in turns, so that slow moments of the machine hit all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from time import perf_counter
from typing import TypeVar

__all__ = ["interleave", "turn_order"]

Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")


def interleave(
    ways: Mapping[Name, Callable[[], T]],
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float = 0.0,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = perf_counter,
) -> dict[Name, list[T]]:
    """The result of each way in each round, without the first ``warmup`` rounds.

    At least ``rounds`` rounds run, and more while another one of mean length fits into ``seconds``. Each round has an
    its own order (:func:`turn_order`).
    """
    names = list(ways)
    given: dict[Name, list[T]] = {name: [] for name in names}
    turn, start = 0, clock()
    while True:
        if turn == warmup:
            start = clock()
        done = turn - warmup
        if done >= rounds and (clock() - start) * (done + 1) / done > seconds:
            return given
        for at in turn_order(len(names), turn):
            name = names[at]
            many = f" of {rounds}" if not seconds else ""
            progress(f"{'warm-up' if done < 0 else f'round {done + 1}{many}'}: {name}")
            one = ways[name]()
            if done >= 0:
                given[name].append(one)
        turn += 1


def turn_order(num: int, turn: int) -> tuple[int, ...]:
    """The order in which ``num`` ways run in round ``turn``.

    A way that leaves caches or clocks in another state than the rest would always help, or harm, the one that follows
    it. In ``2 * num`` rounds each way follows every other one equally often, twice, and each begins twice (Williams'
    design: a zigzag, shifted by one every second round, backwards in the rounds between).

    >>> [turn_order(3, turn) for turn in range(4)]
    [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)]
    """
    zigzag = [(at + 1) // 2 if at % 2 else -(at // 2) for at in range(num)]
    order = tuple((at + turn // 2) % num for at in zigzag)
    return order[::-1] if turn % 2 else order
