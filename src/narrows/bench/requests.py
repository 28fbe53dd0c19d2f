"""Random requests of stated lengths, and the times of their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

from narrows.engine.core import Engine

__all__ = ["Times", "random_prompts", "timed"]

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """``total``: seconds from the first request to the last token. ``tokens``: when each request got each of its."""

    total: float
    tokens: tuple[tuple[float, ...], ...]

    def step_seconds(self) -> tuple[float, ...]:
        """Between the tokens of the request that began last, while all requests were running; the first two steps,
        which still overlap the prompts, left out."""
        last = max(self.tokens, key=lambda times: times[0])
        end = min(times[-1] for times in self.tokens)
        ticks = [time for time in last if time <= end][2:]
        return tuple(b - a for a, b in pairwise(ticks))


def random_prompts(number: int, length: int, vocab_size: int, seed: int) -> list[Prompt]:
    """Prompts of ids drawn evenly from the vocabulary; the same for the same arguments."""
    draw = random.Random(f"{seed} {number} {length}")
    return [tuple(draw.randrange(vocab_size) for _ in range(length)) for _ in range(number)]


def timed(engine: Engine, prompts: Sequence[Prompt], max_tokens: int) -> Times:
    """Run the prompts together, each to exactly ``max_tokens`` tokens, greedily."""
    start = perf_counter()
    ids = [engine.add(prompt, max_tokens).id for prompt in prompts]
    tokens: dict[int, list[float]] = {id: [] for id in ids}
    for request in engine.run():
        tokens[request.id].append(perf_counter() - start)
    assert all(len(times) == max_tokens for times in tokens.values()), "a request got another number of tokens"
    return Times(total=perf_counter() - start, tokens=tuple(tuple(tokens[id]) for id in ids))
