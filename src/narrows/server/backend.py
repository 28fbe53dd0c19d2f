"""What a server asks of whatever generates tokens, as a Protocol: token ids in, updates out.

Knows requests and numbers; not text, HTTP, ranks or plans. Calls may come from any thread; updates are delivered on a
thread of the backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from narrows.sched.serving import Draining, Generation, Health, QueueFull, Stats, Unavailable, Update

__all__ = ["Backend", "Draining", "Generation", "Health", "QueueFull", "Stats", "Unavailable", "Update"]


class Backend(Protocol):
    """Generates tokens for many callers at once."""

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        """Take a generation in; returns its number. ``deliver`` gets every update and must not block.

        Raises:
            ConfigError: it can never run here (too long, an id outside the vocabulary).
            QueueFull: as many wait as may, and of this client not fewer than its even part.
            Draining, Unavailable: nothing is taken now.
        """
        ...

    def abort(self, number: int) -> None:
        """End a generation now; its pages are free within one step. One that has ended already is left as it is."""
        ...

    def health(self) -> Health:
        """Asks the ranks; answers within 2 seconds whatever they do."""
        ...

    def stats(self) -> Stats:
        """Numbers for people and for metrics; costs next to nothing."""
        ...

    def start_trace(self, num_steps: int | None = None) -> dict[str, Any]:
        """Begin to write a trace of the next steps, ``num_steps`` at most; where it goes.

        Raises:
            ConfigError: it writes none, one is being made, or a number that cannot be.
        """
        ...

    def stop_trace(self) -> dict[str, Any]:
        """End the trace, or take one that has ended by itself; what was written.

        Raises:
            ConfigError: none was begun, or it cannot be written.
        """
        ...

    def info(self) -> dict[str, Any]:
        """What runs: config, mesh, ranks, transport, plan book, prices' sources; plain values for JSON."""
        ...
