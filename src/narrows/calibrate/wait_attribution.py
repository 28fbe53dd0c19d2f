"""Attributes waits: turns the ranks' clocks around the operations of a plan into what each operation costs.

A rank that reaches a collective first waits there, so its clock charges the other ranks' work to the collective. If
ranks take turns on a core, or only some ranks have rows, most of a collective's time is such a wait, whatever its
bytes. Here the wait is charged to the operations that the slower ranks were running.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["attribute_waits"]

_LEAST_SHARE = 0.1


def attribute_waits(ranks: Sequence[Sequence[float]], is_collective: Sequence[bool], at_once: float) -> list[float]:
    """Seconds that each operation of one execution of a plan costs.

    Their sum is the mean time of the ranks up to the last collective, and the longest rank's time after it. Between two
    collectives the work takes as long as the slowest rank, or, if only ``at_once`` ranks can run at the same time
    (cores over threads), as all ranks one after the other on so many cores. This time is divided among the operations
    in proportion to the same measure of each; the collective gets what is left. A clock also runs while another rank
    has the core, so the work can sum up to more than the whole time. The collective then keeps the time of the rank
    that waited least, or a tenth of the whole if that is less.

    Args:
        ranks: seconds of every operation by each rank's clock; a collective's include its wait.
        is_collective: of each operation, whether it is one: no rank ends it before all have begun it.

    >>> attribute_waits([[4.0, 1.0], [0.0, 5.0]], [False, True], 2)  # one rank has the rows, the other waits for it
    [4.0, 1.0]
    >>> attribute_waits([[4.0, 5.0], [4.0, 5.0]], [False, True], 1)  # both have rows, and share one core
    [8.0, 1.0]
    >>> attribute_waits([[9.0, 1.0], [9.0, 1.0]], [False, True], 1)  # they took turns within the operation
    [9.0, 1.0]
    """
    out = [0.0] * len(is_collective)
    begin = 0
    for end in (*(at + 1 for at, met in enumerate(is_collective) if met), len(is_collective)):
        _attribute(ranks, range(begin, end), begin < end and is_collective[end - 1], at_once, out)
        begin = end
    return out


def _attribute(
    ranks: Sequence[Sequence[float]], steps: range, ends_together: bool, at_once: float, out: list[float]
) -> None:
    """Attribute the operations between two collectives; the last one is the collective if they end together."""
    whole = sum(times[i] for times in ranks for i in steps) / len(ranks)
    alone = steps[:-1] if ends_together else steps
    sums = [sum(times[i] for i in alone) for times in ranks]
    work = max(sums)
    if ends_together:
        least = min(_LEAST_SHARE * whole, *(times[steps[-1]] for times in ranks))
        work = min(_measure(sums, at_once), whole - least)
        out[steps[-1]] = whole - work
    each = [_measure([times[i] for times in ranks], at_once) for i in alone]
    total = sum(each)
    for i, seconds in zip(alone, each, strict=True):
        out[i] = work * seconds / total if total else 0.0


def _measure(seconds: Sequence[float], at_once: float) -> float:
    """How long ranks take together if each works so long."""
    return max(max(seconds), sum(seconds) / at_once)
