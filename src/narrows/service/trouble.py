"""What is wrong with an engine's ranks right now, told from outside: dead, silent, or stuck in a step.

Knows ranks and clocks; not requests. Asks nothing that a stuck rank would have to answer.
"""

from __future__ import annotations

from time import monotonic

from narrows.engine.core import Engine

__all__ = ["stuck_s", "trouble"]

_SILENT_S = 2.0
"""A rank that has said nothing for so long is stopped or cut off; one that lives speaks twice a second."""
_SLOW_FACTOR, _SLOW_S = 20.0, 10.0


def stuck_s(predicted_s: float) -> float:
    """After how many seconds a step of so many predicted ones is taken for stuck: prices may be far off, not so far."""
    return _SLOW_FACTOR * predicted_s + _SLOW_S


def trouble(engine: Engine, oldest: tuple[float, float] | None) -> str:
    """What is wrong, in one line; empty if nothing is known to be.

    ``oldest``: of the oldest step in flight, since when (``monotonic``) it is that, and its predicted seconds.
    """
    if (failure := engine.ranks.failure) is not None:
        return f"the ranks have failed: {' '.join(str(failure).split())}"
    silent = {rank: silence for rank, silence in enumerate(engine.ranks.silence_s()) if silence > _SILENT_S}
    if silent:
        return "; ".join(f"nothing was heard of rank {rank} for {silence:.1f} s" for rank, silence in silent.items())
    if oldest is not None and (age := monotonic() - oldest[0]) > stuck_s(oldest[1]):
        return f"a step runs for {age:.0f} s, and {oldest[1]:.2g} s were predicted"
    return ""
