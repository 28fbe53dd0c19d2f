"""Compiled grammars, the guides that follow them token by token, and the threads that make their masks.

Guides of one grammar share its lexer. The lexer's states grow with the texts it has seen, and it serves one text at a
time, so a grammar's masks are made one after another. A lexer that has grown too large for one text fails for all of
them; a text that may not be the cause starts again with a new lexer.

Most masks take microseconds, less than handing them to a thread. So the caller makes the mask of a grammar whose masks
have all been quick lately; one thread serves unknown grammars, and others serve slow ones. Limits on steps bound every
mask (:class:`~narrows.server.structured_output.trial.GrammarLimits`).
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter, thread_time
from typing import Protocol

import llguidance

from narrows.errors import ConfigError
from narrows.sched.guide import Guide
from narrows.server.cpu_priority import GRAMMAR_NICE, lower_thread_priority
from narrows.server.structured_output.trial import GrammarLimits, in_words

__all__ = ["Grammar", "GrammarGuide", "Lane", "MaskThreads", "Memory"]

_SLOW_S, _SLOW_CPU_S = 0.002, 0.001
"""A mask that takes longer by the clock, and as much of the processor, is slow: a busy machine alone makes none so."""
_CALM, _MOST_CALM = 8, 4096
"""Number of quick masks that prove a grammar, at first and at most: each slow one doubles it."""
_MOVES = 2
"""How often a text begins again with a new lexer."""


class Lane(Protocol):
    """Where guides are taken forward."""

    def submit(self, guide: GrammarGuide) -> None:
        """Have :meth:`GrammarGuide.make` called, in turn with others of its grammar: at once, or soon on a thread."""
        ...


class Memory:
    """Bytes of all grammars that are alive."""

    def __init__(self) -> None:
        self.used = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """So many more are used; fewer, if it is negative."""
        with self._lock:
            self.used += nbytes


class Grammar:
    """One grammar, compiled, with its first mask. It has passed a trial, so it is known to fit into the limits.

    ``nbytes``: its bytes, as its trial has measured them; ``memory`` counts them as long as it lives.

    Raises:
        ConfigError: it is not valid all the same.
    """

    def __init__(
        self, text: str, nbytes: int, tokens: llguidance.LLTokenizer, limits: GrammarLimits, memory: Memory
    ) -> None:
        self.text, self.nbytes, self.limits = text, nbytes, limits
        self._tokens, self._memory = tokens, memory
        self._fresh = llguidance.LLMatcher(tokens, text, log_level=0, limits=limits.of_parser())
        first = self._fresh.deep_copy()
        self.first_mask: bytes = first.compute_bitmask()
        if first.is_error():
            raise ConfigError(in_words(first.get_error(), limits))
        self.is_slow = self.is_proven = False
        """Whether a mask was slow and none of many since; whether many were quick and none slow since."""
        self._num_quick, self._calm = 0, _CALM
        began, spent = perf_counter(), thread_time()
        self._fresh.deep_copy().compute_bitmask()  # everything that is made once exists by now
        self.took(perf_counter() - began, thread_time() - spent)
        memory.take(nbytes)
        weakref.finalize(self, memory.take, -nbytes)
        self.num_guides = 0
        self.is_broken = False
        """Whether its lexer has failed for a text, and so may fail for others."""
        self.renewed: Grammar | None = None
        """The same grammar with its own lexer, if one was made."""
        self._renewing = threading.Lock()
        # Guides that wait for their turn; the lane's own.
        self.turn = threading.Lock()
        self.waiting: deque[GrammarGuide] = deque()
        self.is_scheduled = False

    def took(self, seconds: float, cpu_s: float | None) -> None:
        """A mask was made in so much time; ``cpu_s`` None: of the processor's it is not known."""
        if seconds <= _SLOW_S or (cpu_s is not None and cpu_s <= _SLOW_CPU_S):
            self._num_quick += 1
            if self._num_quick >= self._calm:
                self.is_slow, self.is_proven = False, True
            return
        self.is_proven, self._num_quick = False, 0
        if cpu_s is not None:
            self.is_slow, self._calm = True, min(2 * self._calm, _MOST_CALM)

    def new_matcher(self) -> llguidance.LLMatcher:
        """A matcher at the beginning, which shares this grammar's lexer."""
        return self._fresh.deep_copy()

    def latest(self) -> Grammar:
        """This grammar, or its latest replacement."""
        found = self
        while found.renewed is not None:
            found = found.renewed
        return found

    def renew(self) -> Grammar:
        """The same grammar with a lexer that has not failed; compiled if it does not exist yet."""
        found = self.latest()
        if not found.is_broken:
            return found
        with found._renewing:
            if found.renewed is None:
                found.renewed = Grammar(self.text, self.nbytes, self._tokens, self.limits, self._memory)
            return found.renewed


class GrammarGuide(Guide):
    """One text's constraint.

    When no token may follow, or the grammar became too large (``problem``), no token is allowed any more.
    """

    def __init__(self, grammar: Grammar, lane: Lane) -> None:
        grammar.num_guides += 1
        self.grammar = grammar
        self.problem = ""
        """Why the text ended before its grammar was complete; empty if it did not."""
        self._lane = lane
        self._matcher: llguidance.LLMatcher | None = None
        self._taken: list[int] = []
        self._mask = grammar.first_mask
        self._is_there = True
        self._awaited: threading.Event | None = None
        self._call: Callable[[], None] | None = None
        self._has_ended = False
        self._begins_again = False
        self._moves_left = _MOVES

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit each; those that end the text are among them where it may end."""
        assert self._is_there, "the mask is not there yet"
        return self._mask

    def advance(self, token: int) -> None:
        """Take in the token that was chosen; the next mask comes from the lane."""
        self._taken.append(token)
        self._call = None
        self._awaited, self._is_there = None, False
        self._lane.submit(self)

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is ready."""
        return self._is_there

    def wait(self, timeout_s: float) -> bool:
        """Wait for it, but not for that of a grammar whose masks are slow."""
        if self._is_there or self.grammar.is_slow:
            return self._is_there
        awaited = self._awaited = threading.Event()
        return self._is_there or awaited.wait(timeout_s)

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call once it is ready."""
        self._call = call
        if self._is_there:
            call()

    def end(self) -> None:
        """No more masks are wanted; one that waits for its turn is not made."""
        self._has_ended = True

    # -- in its turn --------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the mask of the next token, and notify that it is ready."""
        if self._has_ended:
            return
        grammar = self.grammar
        if grammar.is_proven:  # not worth a look at the processor's clock
            began = perf_counter()
            mask = self._next_mask()
            grammar.took(perf_counter() - began, None)
        else:
            began, spent = perf_counter(), thread_time()
            mask = self._next_mask()
            spent = thread_time() - spent
            grammar.took(perf_counter() - began, spent)
            if mask is not None and spent > grammar.limits.mask_s and not self.problem:
                self.problem = grammar.limits.slow_mask(spent)
        if mask is None:  # it begins again, in its turn
            self._lane.submit(self)
            return
        self._bring(bytes(len(mask)) if self.problem else mask)

    def fail(self, problem: str) -> None:
        """End it with the reason."""
        self.grammar.is_broken = True
        self.problem = problem
        self._bring(bytes(len(self.grammar.first_mask)))

    def _bring(self, mask: bytes) -> None:
        if self.problem:
            self._matcher = None
        self._mask = mask
        self._is_there = True  # set before the two are read, so that a later caller sees it
        if (awaited := self._awaited) is not None:
            awaited.set()
        if (call := self._call) is not None:
            call()

    def _next_mask(self) -> bytes | None:
        """The mask; None if the grammar's lexer has failed and was replaced."""
        if self._begins_again:
            self._begins_again = False
            self.grammar, self._matcher = self.grammar.renew(), None
            self.grammar.num_guides += 1
            return None
        if self._matcher is None:
            self._matcher = self.grammar.new_matcher()
            self._matcher.consume_tokens(self._taken)
        else:
            self._matcher.consume_token(self._taken[-1])
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return self._failed(mask)
        return bytes(len(mask)) if self._matcher.is_stopped() else mask

    def _failed(self, mask: bytes) -> bytes | None:
        """The lexer is too large: by this text, or by others that shared it."""
        assert self._matcher is not None, "a matcher has failed"
        grammar = self.grammar
        grammar.is_broken = True
        if grammar.num_guides > 1 and self._moves_left:
            self._moves_left -= 1
            self._begins_again = True
            grammar.took(math.inf, math.inf)  # compiling runs on the threads of slow masks
            return None
        self.problem = in_words(self._matcher.get_error(), grammar.limits)
        return mask


_LOG = logging.getLogger("narrows.server")

_NUM_SLOW = 2
"""Threads for slow grammars."""


class MaskThreads:
    """A lane with two queues. Its threads start with their first work, and end with :meth:`close`."""

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
        """End the threads after the queued work."""
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
        if queue is self._slow:
            lower_thread_priority(GRAMMAR_NICE)
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
