"""Threads that take guides forward: one for grammars whose masks come quickly, others for those whose masks do not.

Knows guides and turns. Guides of one grammar go one at a time, in the order in which they came; grammars take turns, so
that one with many texts does not keep the others waiting.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from narrows.server.grammar.compiled import Grammar, GrammarGuide

__all__ = ["MaskThreads"]

_LOG = logging.getLogger("narrows.server")

_NUM_SLOW = 2
"""Threads for slow grammars."""


class MaskThreads:
    """A lane for guides, with two queues. Its threads start with the first guide, and end with :meth:`close`."""

    def __init__(self) -> None:
        self._quick: SimpleQueue[Grammar | None] = SimpleQueue()
        self._slow: SimpleQueue[Grammar | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._has_started = False

    def submit(self, guide: GrammarGuide) -> None:
        """Have the guide's next mask made."""
        if not self._has_started:
            self._start()
        grammar = guide.grammar
        with grammar.turn:
            grammar.waiting.append(guide)
            begins, grammar.is_scheduled = not grammar.is_scheduled, True
        if begins:
            self._put(grammar)

    def close(self) -> None:
        """End the threads when they have done what is there."""
        for queue, count in ((self._quick, 1), (self._slow, _NUM_SLOW)):
            for _ in range(count):
                queue.put(None)

    def _put(self, grammar: Grammar) -> None:
        (self._slow if grammar.is_slow else self._quick).put(grammar)

    def _start(self) -> None:
        with self._starting:
            if self._has_started:
                return
            self._has_started = True
            for queue, count in ((self._quick, 1), (self._slow, _NUM_SLOW)):
                for number in range(count):
                    name = f"narrows masks {'slow' if queue is self._slow else 'quick'} {number}"
                    threading.Thread(target=self._work, args=(queue,), name=name, daemon=True).start()

    def _work(self, queue: SimpleQueue[Grammar | None]) -> None:
        while (grammar := queue.get()) is not None:
            guide = grammar.waiting.popleft()
            try:
                guide.make()
            except BaseException as error:  # llguidance's panics are no Exceptions
                _LOG.exception("a mask could not be made")
                guide.fail(f"the mask of its next token could not be made ({type(error).__name__})")
            with grammar.turn:
                goes_on = grammar.is_scheduled = bool(grammar.waiting)
            if goes_on:
                self._put(grammar)
            del guide, grammar  # nothing is kept alive while the queue is empty
