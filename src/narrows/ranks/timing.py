"""Every duration that decides whether a rank is late, stuck or dead, in one table. PURE.

The coordinator, its ranks and nodes, and the service use the same table. The coordinator passes it on, so a test of
faults can use short durations.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TIMING", "Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds, and one factor."""

    beat_s: float = 0.5
    """Ranks and nodes say so often that they live."""
    doubt_s: float = 2.0
    """A rank that has said nothing for so long makes a service unhealthy: it is stopped or cut off."""
    silence_s: float = 6.0
    """One that has said nothing for so long is taken for gone."""
    suspended_s: float = 2.0
    """A coordinator that was itself suspended for this long (Ctrl-Z, a laptop's lid) forgives silence before that."""
    stuck_s: float = 3.0
    """When nobody has been able to move for so long, waiting longer brings nothing."""
    blame_s: float = 2.0
    """How long it may take until it is known which rank went away, when others notice first that one has."""
    tell_s: float = 1.0
    """How long after a rank has died the others may say what they were at; none waits once all have."""
    exit_s: float = 0.5
    """How long a process may take to end after it has closed its connection."""
    grace_s: float = 1.0
    """How long ranks have to end by themselves; then comes SIGKILL."""
    join_s: float = 120.0
    """How long processes wait for each other before the first step."""
    slow_factor: float = 20.0
    slow_s: float = 10.0
    """A step that takes longer than so many times its price and so many seconds is stuck: prices may be off, not so."""

    def step_is_stuck_after(self, predicted_s: float) -> float:
        """Seconds that a step of so many predicted ones may take.

        >>> Timing().step_is_stuck_after(0.5)
        20.0
        """
        return self.slow_factor * predicted_s + self.slow_s


TIMING = Timing()
"""What holds where nothing else is asked for."""
