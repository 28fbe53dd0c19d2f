"""Where guides are taken forward: on threads, but at once for grammars whose masks have all come quickly lately.

Knows guides and turns. Guides of one grammar go one at a time, in the order in which they came; grammars take turns, so
that one with many texts does not keep the others waiting. One thread is for grammars that are not known yet, others for
those that are known to be slow. To hand some microseconds of work to a thread costs more than they, and most masks are
no more: so whoever asks for the mask of a proven grammar makes it. If that one is slow all the same, the limits on its
steps bound it (:mod:`narrows.server.grammar.limits`), and the next ones are made on threads.
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
    """A lane with two queues. Its threads start when there is something for them, and end with :meth:`close`."""

    def __init__(self) -> None:
        self._quick: SimpleQueue[Grammar | None] = SimpleQueue()
        self._slow: SimpleQueue[Grammar | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._has_started = False

    def submit(self, guide: GrammarGuide) -> None:
        """Have the guide's next mask made."""
        grammar = guide.grammar
        with grammar.turn:
            at_once = grammar.is_proven and not grammar.is_scheduled
            if not at_once:
                grammar.waiting.append(guide)
            begins, grammar.is_scheduled = not grammar.is_scheduled, True
        if at_once:
            self._make(grammar, guide)
        elif begins:
            self._put(grammar)

    def close(self) -> None:
        """End the threads when they have done what is there."""
        for queue, count in ((self._quick, 1), (self._slow, _NUM_SLOW)):
            for _ in range(count):
                queue.put(None)

    def _put(self, grammar: Grammar) -> None:
        if not self._has_started:
            self._start()
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
            self._make(grammar, grammar.waiting.popleft())
            del grammar  # it is kept alive by nothing while the queue is empty

    def _make(self, grammar: Grammar, guide: GrammarGuide) -> None:
        """The turn of a guide; then the next of its grammar, after other grammars."""
        try:
            guide.make()
        except BaseException as error:  # llguidance's panics are no Exceptions
            _LOG.exception("a mask could not be made")
            guide.fail(f"the mask of its next token could not be made ({type(error).__name__})")
        with grammar.turn:
            goes_on = grammar.is_scheduled = bool(grammar.waiting)
        if goes_on:
            self._put(grammar)
