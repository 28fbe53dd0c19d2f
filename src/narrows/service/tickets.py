"""Generations that somebody waits for, and what they are told. Knows requests and updates; no ranks, no threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from narrows.api import Generation, Update
from narrows.sched.scheduler import Request

__all__ = ["Ticket", "tell"]

_LOG = logging.getLogger("narrows.engine")


@dataclass(slots=True, eq=False)
class Ticket:
    """A generation that somebody waits for."""

    number: int
    generation: Generation
    deliver: Callable[[Update], None]
    request: Request
    num_told: int = 0
    scores_told: bool = False

    def news(self) -> Update:
        """What the request has that was not told yet."""
        request, start = self.request, self.num_told
        scores: tuple[Any, ...] = ()
        if not self.scores_told:
            scores, self.scores_told = tuple(request.prompt_logprobs), True
        self.num_told = len(request.output)
        return Update(
            token_ids=tuple(request.output[start:]),
            logprobs=tuple(request.logprobs[start:]),
            prompt_logprobs=scores,
            num_cached_prompt=request.num_cached_prompt,
            finish_reason=request.finish_reason,
        )


def tell(ticket: Ticket, update: Update) -> None:
    """Deliver an update; a caller that raises does not stop the others."""
    try:
        ticket.deliver(update)
    except Exception:
        _LOG.exception("an update of generation %d could not be delivered", ticket.number)
