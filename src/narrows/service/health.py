"""Current faults of an engine's ranks: dead, silent, or stuck in a step.

Found from outside, without a call that a stuck rank would have to answer.
"""

from __future__ import annotations

from time import monotonic

from narrows.engine.core import Engine

__all__ = ["fault"]


def fault(engine: Engine, oldest: tuple[float, float] | None) -> str:
    """The fault in one line; empty if none is known.

    ``oldest``: since when (``monotonic``) the oldest step in flight has been that, and its predicted seconds.
    """
    if (failure := engine.ranks.failure) is not None:
        return f"the ranks have failed: {' '.join(str(failure).split())}"
    doubt_s = engine.timing.doubt_s
    silent = {rank: silence for rank, silence in enumerate(engine.ranks.silence_s()) if silence > doubt_s}
    if silent:
        return "; ".join(f"nothing was heard of rank {rank} for {silence:.1f} s" for rank, silence in silent.items())
    if oldest is not None and (age := monotonic() - oldest[0]) > engine.timing.step_is_stuck_after(oldest[1]):
        return f"a step runs for {age:.0f} s, and {oldest[1]:.2g} s were predicted"
    return ""
