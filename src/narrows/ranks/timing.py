"""Every duration that decides whether a rank is late, stuck or dead, in one table.

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
    """Interval of heartbeats from ranks and nodes."""
    doubt_s: float = 2.0
    """After this much silence of a rank `/health` is red: the rank is probably suspended or unreachable."""
    silence_s: float = 6.0
    """A rank that is silent for this long counts as dead."""
    suspended_s: float = 2.0
    """A coordinator that was itself suspended for this long (Ctrl-Z, a laptop's lid) forgives silence before that."""
    stuck_s: float = 3.0
    """When ranks have waited for each other for this long, none of them will go on."""
    blame_s: float = 2.0
    """When a rank reports a lost peer, how long to wait until the peer's own end becomes known."""
    tell_s: float = 1.0
    """After a rank has died, how long the others may take to report what they were at."""
    exit_s: float = 0.5
    """How long a process may take to exit after its connection has ended."""
    grace_s: float = 1.0
    """How long ranks have to end by themselves before SIGKILL."""
    join_s: float = 120.0
    """How long processes wait for each other at the start."""
    slow_factor: float = 20.0
    slow_s: float = 10.0
    """A step is stuck after ``slow_factor`` times its predicted time plus ``slow_s``: no price is that far off."""

    def step_is_stuck_after(self, predicted_s: float) -> float:
        """Seconds that a step may take before it counts as stuck.

        >>> Timing().step_is_stuck_after(0.5)
        20.0
        """
        return self.slow_factor * predicted_s + self.slow_s


TIMING = Timing()
"""The default."""
