"""Where the time of a start goes, from the process's first instruction to the first token."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Phase", "StartClock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``of_ranks``: a part of the phase before it, as long as it took the slowest rank."""

    name: str
    seconds: float
    of_ranks: bool = False


class StartClock:
    """Notes the ends of phases. The first phase began with the process where the system says when that was, else with
    the clock."""

    def __init__(self) -> None:
        self._last = time.perf_counter() - _age_s()
        self.phases: list[Phase] = []

    def end(self, name: str) -> None:
        """The phase ``name`` ends now, and the next one begins."""
        now = time.perf_counter()
        self.phases.append(Phase(name=name, seconds=now - self._last))
        self._last = now

    def of_ranks(self, name: str, seconds: float) -> None:
        """A part of the phase that has just ended."""
        self.phases.append(Phase(name=name, seconds=seconds, of_ranks=True))

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases if not phase.of_ranks)


def _age_s() -> float:
    """Seconds since this process was started, to a hundredth; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
