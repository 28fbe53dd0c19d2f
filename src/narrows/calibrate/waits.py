"""Whose time a wait is: clocks of ranks around the steps of a walk, turned into what each step costs. PURE.

Knows seconds by rank and step, and which steps wait for other ranks; not what the steps compute. A rank that comes to a
collective first waits there for the work of the others, so its clock shows their work as time of the collective. Where
ranks take turns on a core, or rows lie on some ranks only, most of what a collective takes by the clock is such work,
and as much as the step before it makes it, whatever the bytes. Here work is counted where it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["without_waits"]

_LEAST_SHARE = 0.1


def without_waits(ranks: Sequence[Sequence[float]], meets: Sequence[bool], at_once: float) -> list[float]:
    """Seconds that each step of one walk costs; together as long as the mean rank walked to the last meeting, and the
    longest from there on.

    Between two meetings the work of ranks takes as long as the longest of them, or, where only ``at_once`` ranks can
    run at the same time (cores over threads), as all of them one after the other on so many cores. It is dealt to the
    steps in proportion to that same measure of each; the meeting costs what is left of the time. A clock around work
    also runs while another rank has the core, so that sum can be more than there was time for: the meeting keeps what
    it took the rank that waited least, or a tenth of the time if that is less.

    Args:
        ranks: seconds of every op by each rank's clock, those of a meeting with its wait.
        meets: which steps no rank ends before all have begun them.

    >>> without_waits([[4.0, 1.0], [0.0, 5.0]], [False, True], 2)  # one rank has the rows, the other waits for it
    [4.0, 1.0]
    >>> without_waits([[4.0, 5.0], [4.0, 5.0]], [False, True], 1)  # both have some, and one core
    [8.0, 1.0]
    >>> without_waits([[9.0, 1.0], [9.0, 1.0]], [False, True], 1)  # they took turns within the step
    [9.0, 1.0]
    """
    out = [0.0] * len(meets)
    begin = 0
    for end in (*(at + 1 for at, met in enumerate(meets) if met), len(meets)):
        _attribute(ranks, range(begin, end), begin < end and meets[end - 1], at_once, out)
        begin = end
    return out


def _attribute(
    ranks: Sequence[Sequence[float]], steps: range, ends_together: bool, at_once: float, out: list[float]
) -> None:
    """Book the steps from one meeting to the next, which is the last of them if they end together."""
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
    """How long ranks that work so long each take together."""
    return max(max(seconds), sum(seconds) / at_once)
