"""The state that all routes share: model, backend, threads and child processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from narrows.api import Backend, Generation
from narrows.server.http.body import BodyReader
from narrows.server.http.body_process import BodyProcess
from narrows.server.http.errors import invalid
from narrows.server.http.round_robin import RoundRobin
from narrows.server.metrics import Metrics
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.request import RequestReader
from narrows.server.structured_output.constraints import GuideMaker
from narrows.server.workers import LoopCalls, Pools

__all__ = ["ServerState"]

_MAX_LOGPROBS = 2**20
"""Of one answer: each takes some 400 bytes while the answer is made."""
_BODIES_AT_ONCE = 8
"""Bodies of the largest size that may be read or checked at once; small ones do not count."""


class ServerState(RequestReader):
    """A backend with a model's name, text and defaults.

    Raises:
        ConfigError: a parser that is not known, or one for a model without a tokenizer.
    """

    def __init__(self, backend: Backend, model: ServedModel, options: ServerOptions) -> None:
        super().__init__(model, options)
        self.backend = backend
        self.metrics = Metrics(backend)
        self.turns = RoundRobin()
        self.process = BodyProcess(model, options) if options.body_process else None
        self.pools = Pools()
        self.bodies = BodyReader(
            self, self.pools, self.process, max_held_bytes=_BODIES_AT_ONCE * options.max_body_bytes
        )
        self.draining = False
        self._loop_calls: LoopCalls | None = None
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

    @property
    def loop_calls(self) -> LoopCalls:
        """Runs calls of other threads on the running event loop."""
        loop = asyncio.get_running_loop()
        if self._loop_calls is None or self._loop_calls.loop is not loop:
            self._loop_calls = LoopCalls(loop)
        return self._loop_calls

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
