"""How the running slots were shared among clients while requests waited, step by step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from narrows.workload.fairness import jain, max_min

__all__ = ["RunningSlots"]


class RunningSlots:
    """Sums up, for every client, the slots that it had and those that were its max-min fair share.

    Only steps count in which a text waits and more than one client has any: else every client has what it wants.
    """

    def __init__(self) -> None:
        self._had: defaultdict[str, float] = defaultdict(float)
        self._due: defaultdict[str, float] = defaultdict(float)

    def note(self, seconds: float, running: Mapping[str, int], waiting: Mapping[str, int]) -> None:
        """A step of so many seconds, and how many texts of each client ran and waited in it."""
        wanted = Counter(running)
        wanted.update(waiting)
        if not waiting or len(wanted) < 2:
            return
        for client, due in max_min(sum(running.values()), wanted).items():
            self._had[client] += seconds * running.get(client, 0)
            self._due[client] += seconds * due

    @property
    def parts(self) -> list[float]:
        """Of every client that competed: what it had, as a part of its share."""
        return [self._had[client] / due for client, due in self._due.items() if due]

    @property
    def jain(self) -> float:
        """Jain's index over them; 1 if no clients ever competed."""
        return jain(self.parts)
