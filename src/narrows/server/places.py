"""Places for connections: how many may be there at once, which one makes room, and what is kept free for probes.

Knows no sockets: whoever has a place is told to make room, and says when it waits for its client and when it works.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Occupant", "Places"]

_LOG = logging.getLogger("narrows.server")

_QUIET_S = 60.0
"""How long places must have been free before it is said again that they are taken."""


class Occupant(Protocol):
    """What has a place."""

    def make_room(self) -> None:
        """Leave; the place has been given to another."""
        ...


class Places:
    """``num`` places, and ``num_reserved`` more for connections that may ask for /health and /metrics only.

    A connection that comes when all places are taken takes that of the oldest one without a request under way. If
    there is none, it gets a reserved place. The log says once that places have run out, and again only after some were
    free for a minute of ``clock``.
    """

    def __init__(self, num: int, num_reserved: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept = _Room(num)
        self._reserved = _Room(num_reserved)
        self._clock = clock
        self._free_since = -math.inf  # inf: none is free

    def __len__(self) -> int:
        """Connections that have a place."""
        return len(self._kept.members) + len(self._reserved.members)

    def take(self, who: Occupant) -> bool:
        """Give a new connection a place, at which it waits; False: there is none, it must go."""
        self._notice()
        for room in (self._kept, self._reserved):
            if room.makes_room():
                room.members.add(who)
                room.waiting[who] = None
                return True
        return False

    def works(self, who: Occupant) -> bool:
        """A request of it is under way. Returns whether it may ask for anything; False: its place is a reserved one."""
        if who in self._reserved.members and self._kept.makes_room():
            self._reserved.remove(who)
            self._kept.members.add(who)
        for room in (self._kept, self._reserved):
            room.waiting.pop(who, None)
        return who in self._kept.members

    def waits(self, who: Occupant) -> None:
        """It has no request under way; from now on it may have to make room."""
        for room in (self._kept, self._reserved):
            if who in room.members:
                room.waiting[who] = None

    def leave(self, who: Occupant) -> None:
        """It is gone. One that has made room, or never had a place, may say so too."""
        for room in (self._kept, self._reserved):
            room.remove(who)
        if self._kept.has_free and self._free_since == math.inf:
            self._free_since = self._clock()

    def _notice(self) -> None:
        if self._kept.has_free:
            return
        if self._clock() - self._free_since >= _QUIET_S:
            _LOG.warning(
                "all %d places for connections are taken (--max-connections): the oldest one without a request makes "
                "room; while there is none, new requests get 503",
                self._kept.num,
            )
        self._free_since = math.inf


class _Room:
    """Places of one kind. ``waiting``: those of its members that may have to make room, the oldest first."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.members: set[Occupant] = set()
        self.waiting: dict[Occupant, None] = {}

    @property
    def has_free(self) -> bool:
        return len(self.members) < self.num

    def makes_room(self) -> bool:
        """Whether there is a free place now; the oldest member that waits may have left for it."""
        if not self.has_free and self.waiting:
            oldest = next(iter(self.waiting))
            self.remove(oldest)
            oldest.make_room()
        return self.has_free

    def remove(self, who: Occupant) -> None:
        self.members.discard(who)
        self.waiting.pop(who, None)
