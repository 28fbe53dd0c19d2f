"""Stop strings over text that comes in pieces. Knows text only.

A piece may end in what could become a stop string, so that much is held back until more text decides.

>>> stop = StopStrings(("END",))
>>> stop.push("one E"), stop.push("N"), stop.push("TER END two"), stop.found
('one ', '', 'ENTER ', True)
"""

from __future__ import annotations

from bisect import bisect_left

from narrows.errors import ConfigError

__all__ = ["StopStrings"]


class StopStrings:
    """Passes text on until one of ``stops`` is complete in it; the stop string itself is not passed on.

    The one that ends first counts; of those that end together, the one that begins first. So the result does not
    depend on where the text was cut into pieces.

    Raises:
        ConfigError: an empty stop string, which would stop everywhere.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("a stop string is empty: it would stop before the first token")
        self.stops = stops
        self.found = False
        self.which = ""
        """The stop string that was found."""
        self.rest = ""
        """What came after it in the piece that completed it."""
        self._held = ""
        self._sorted = sorted(stops)  # those with the same beginning stand together
        self._longest = max(map(len, stops), default=0)

    def push(self, text: str) -> str:
        """The text that is now known to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            end, at = min(ends)
            out, self.which, self.rest = self._held[:at], self._held[at:end], self._held[end:]
            self._held = ""
            return out
        keep = self._possible_start()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        out, self._held = self._held, ""
        return "" if self.found else out

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            at = bisect_left(self._sorted, end)
            if at < len(self._sorted) and self._sorted[at].startswith(end):
                return length
        return 0
