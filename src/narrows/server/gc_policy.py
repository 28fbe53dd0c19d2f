"""When the interpreter looks for garbage: full collections wait for a moment without requests.

A full collection holds the interpreter's lock while it visits every object. With a thousand requests in flight that
took 375 ms, in which no stream got a token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

__all__ = ["FullCollections"]

_NEVER = 1 << 30
_IDLE, _BUSY = 20, 2000
"""Collections of young objects between two full ones, without requests and with them. Each stands for some 7,000
objects that were made and not freed at once."""


def _num_young() -> int:
    """Collections of young objects (the middle generation) until now."""
    return int(gc.get_stats()[1]["collections"])


class FullCollections:
    """Decides when full collections run; those of young objects, a millisecond each, stay automatic.

    Args:
        collect: runs a full collection.
        num_young: how many collections of young objects there were.
    """

    def __init__(self, collect: Callable[[], object] = gc.collect, num_young: Callable[[], int] = _num_young) -> None:
        self._collect, self._num_young = collect, num_young
        self._seen = num_young()

    @staticmethod
    def begin() -> None:
        """End automatic full collections, and exempt the objects that exist now: they will stay."""
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        gc.freeze()

    def look(self, *, busy: bool) -> None:
        """Collect if enough was made since the last time; the caller calls this several times a second."""
        if self._num_young() - self._seen >= (_BUSY if busy else _IDLE):
            self._collect()
            self._seen = self._num_young()
