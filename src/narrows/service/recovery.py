"""Recovery from failed ranks: running requests end with the reason, and new ranks run those that only waited."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from time import monotonic

from narrows.api import Update
from narrows.errors import RankError
from narrows.service.active_request import ActiveRequest, notify
from narrows.service.loop import Loop
from narrows.service.queue import RequestQueue

__all__ = ["Recovery"]

_LOG = logging.getLogger("narrows.engine")

_RESTART_S = 60.0
"""If replacement ranks fail within so many seconds of being ready, the service ends."""


class Recovery:
    """Starts new ranks in place of failed ones, or ends everything.

    ``start`` starts ranks and gives the loop on them. ``failure``: one line on why no ranks are left; empty while
    they are replaced. ``clock``: in seconds.
    """

    def __init__(
        self,
        start: Callable[[], Loop],
        queue: RequestQueue,
        *,
        restart: bool,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.failure = ""
        self.num_restarts = 0
        self._start, self._queue, self._restart, self._clock = start, queue, restart, clock
        self._ready_again_at = -math.inf

    def after(self, loop: Loop, error: Exception, arrived: list[ActiveRequest]) -> Loop | None:
        """``error`` has ended the ranks of ``loop``; the loop on the new ranks, None without any.

        The queue is closed; ``arrived`` are those that ``loop`` had not taken in, and are its again afterwards.
        """
        reason = one_line(error)
        again = self._restart and not self._queue.is_draining and self._clock() - self._ready_again_at > _RESTART_S
        _LOG.error("the ranks have failed: %s", reason)
        if not isinstance(error, RankError):
            _LOG.error("where it was raised:", exc_info=error)
        waiting = [*loop.end_failed(reason, all_of_them=not again), *arrived]
        _end(loop)
        if not again:
            self._fail(reason, waiting)
            return None
        _LOG.warning("the ranks are started again; %d generations that waited will run there", len(waiting))
        try:
            started = self._start()
        except Exception as final:
            self._fail(one_line(final), waiting)
            return None
        self._ready_again_at = self._clock()  # loading may take longer than the new ranks then live
        for active in list(waiting):
            try:
                active.request = started.engine.request(active.generation)
            except Exception as impossible:
                waiting.remove(active)
                started.give_up(active, impossible)
        self._queue.put_back(waiting)
        self.num_restarts += 1
        return started

    def _fail(self, reason: str, waiting: list[ActiveRequest]) -> None:
        """There will be no ranks any more."""
        self.failure = f"the ranks have failed: {reason}"
        self._queue.forget(*waiting, ran=False)
        for active in waiting:
            notify(active, Update(finish_reason="error", error=self.failure))


def one_line(error: Exception) -> str:
    """The message of an error, or its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _end(loop: Loop) -> None:
    loop.engine.close()
    gc.unfreeze()  # the engine that a server began with
    gc.collect()  # the error holds frames, and those the weights of ranks that are threads
