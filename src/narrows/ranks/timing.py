"""Every duration that decides whether a rank is late, stuck or dead, in one table.

The coordinator, its ranks and nodes, and the service use the same table. The coordinator passes it on, so a test of
faults can use short durations.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TIMING", "Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds, and two factors."""

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
    longest_factor: float = 5.0
    first_s: float = 300.0
    """A step is stuck after ``slow_s``, ``slow_factor`` times its predicted time, and ``longest_factor`` times the
    longest step of its bucket so far, or ``first_s`` where there was none."""

    def step_limit_s(self, predicted_s: float, longest_s: float | None) -> float:
        """Seconds that a step may take before it counts as stuck. ``longest_s``: of its bucket's steps so far.

        >>> Timing().step_limit_s(0.5, 2.0), Timing().step_limit_s(0.5, None)
        (30.0, 320.0)
        """
        learned_s = self.first_s if longest_s is None else self.longest_factor * longest_s
        return self.slow_s + self.slow_factor * predicted_s + learned_s


TIMING = Timing()
"""The default."""
