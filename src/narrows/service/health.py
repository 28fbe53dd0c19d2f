"""Current faults of an engine's ranks: dead, silent, or stuck in a step.

Found from outside, without a call that a stuck rank would have to answer.
"""

from __future__ import annotations

from narrows.engine.core import Engine
from narrows.service.step_limit import StepLimits

__all__ = ["fault"]


def fault(engine: Engine, limits: StepLimits) -> str:
    """The fault in one line; empty if none is known. ``limits``: those of the engine's steps."""
    if (failure := engine.ranks.failure) is not None:
        return f"the ranks have failed: {' '.join(str(failure).split())}"
    doubt_s = engine.timing.doubt_s
    silent = {rank: silence for rank, silence in enumerate(engine.ranks.silence_s()) if silence > doubt_s}
    if silent:
        return "; ".join(f"nothing was heard of rank {rank} for {silence:.1f} s" for rank, silence in silent.items())
    return limits.overdue()
