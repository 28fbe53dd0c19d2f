"""A request that a client waits for, and the updates that it is still to get."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from narrows.api import Generation, Update
from narrows.sched.scheduler import Request

__all__ = ["ActiveRequest", "notify"]

_LOG = logging.getLogger("narrows.engine")


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A generation and the scheduler's request for it, until it ends; ``deliver`` takes its updates."""

    number: int
    generation: Generation
    deliver: Callable[[Update], None]
    request: Request
    num_delivered: int = 0
    scores_delivered: bool = False

    def update(self) -> Update:
        """The request's new tokens since the last update."""
        request, start = self.request, self.num_delivered
        scores: tuple[Any, ...] = ()
        if not self.scores_delivered:
            scores, self.scores_delivered = tuple(request.prompt_logprobs), True
        self.num_delivered = len(request.output)
        return Update(
            token_ids=tuple(request.output[start:]),
            logprobs=tuple(request.logprobs[start:]),
            prompt_logprobs=scores,
            num_cached_prompt=request.num_cached_prompt,
            finish_reason=request.finish_reason,
        )


def notify(active: ActiveRequest, update: Update) -> None:
    """Deliver an update; a caller that raises does not stop the others."""
    try:
        active.deliver(update)
    except Exception:
        _LOG.exception("an update of generation %d could not be delivered", active.number)
