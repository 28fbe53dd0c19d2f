"""What all routes of one server share: what it takes to read bodies, the backend, and the threads and processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from narrows.api import Backend, Generation
from narrows.server.errors import ApiError, invalid
from narrows.server.guides import GuideMaker
from narrows.server.ids import new_id
from narrows.server.intake import Intake
from narrows.server.intake_process import IntakeProcess
from narrows.server.metrics import Metrics
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.pools import Pools
from narrows.server.reading import Reading
from narrows.server.running import Bridge, Running
from narrows.server.turns import Turns

__all__ = ["ServerState"]

_MAX_LOGPROBS = 2**20
"""Of one answer: each takes some 400 bytes while the answer is made."""
_BODIES_AT_ONCE = 8
"""Bodies of the largest size that may be read or checked at once; small ones do not count."""


class ServerState(Reading):
    """A backend with a model's name, text and defaults.

    Raises:
        ConfigError: a parser that is not known, or one for a model without a tokenizer.
    """

    def __init__(self, backend: Backend, model: ServedModel, options: ServerOptions) -> None:
        super().__init__(model, options)
        self.backend = backend
        self.metrics = Metrics(backend)
        self.turns = Turns()
        self.process = IntakeProcess(model, options) if options.intake_process else None
        self.pools = Pools()
        self.intake = Intake(self, self.pools, self.process, max_held_bytes=_BODIES_AT_ONCE * options.max_body_bytes)
        self.draining = False
        self._bridge: Bridge | None = None
        self.guides = None
        if model.tokenizer is not None:
            self.guides = GuideMaker(model.tokenizer, vocab_size=model.vocab_size, end_ids=model.eos_ids)

    def prepare(self) -> None:
        """Make the tables of the tokenizer now that first requests would wait for, with the interpreter's lock held.

        The process that reads large bodies starts too.
        """
        if self.process is not None:
            self.process.start()
        if self.guides is not None:
            self.guides.prepare()
        if self.model.tokenizer is not None:
            self.model.tokenizer.fewest_tokens("")

    def close(self) -> None:
        """End the processes and threads that bodies and constraints need; for when no request is served any more."""
        if self.process is not None:
            self.process.end()
        if self.guides is not None:
            self.guides.close()

    def running(self, client: str = "") -> Running:
        """Generations of a new request, on behalf of ``client``; empty: the request is a client of its own.

        Raises:
            ApiError: 503, the server is ending.
        """
        if self.draining:
            message = "the server is ending: it finishes what it has and takes nothing new"
            raise ApiError(503, message, code="draining")
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = Bridge(loop)
        return Running(self.backend, self._bridge, self.metrics, self.turns, client or new_id("request"))

    @staticmethod
    def check_logprobs(generations: Sequence[Generation]) -> int:
        """How many log-probabilities an answer may hold. A single text may have them for all its tokens.

        Raises:
            ApiError: 400, several texts with too many.
        """
        total = sum(_num_logprobs(generation) for generation in generations)
        if total > _MAX_LOGPROBS and len(generations) > 1:
            message = f"the answer may hold {total:,} log-probabilities; one request may ask for {_MAX_LOGPROBS:,}"
            raise invalid(f"{message}: ask for fewer tokens, fewer texts, or fewer of each token's best", "logprobs")
        return total


def _num_logprobs(generation: Generation) -> int:
    sampling = generation.sampling
    if sampling is None:
        return 0
    of_text = generation.max_tokens * (sampling.logprobs + 1) if sampling.logprobs is not None else 0
    of_prompt = len(generation.prompt) * (sampling.prompt_logprobs + 1) if sampling.prompt_logprobs is not None else 0
    return of_text + of_prompt
