"""What all peers' workers share: a loop that reads one JSON request a line from stdin, and answers on stdout.

Plain Python, since every worker runs in its peer's own environment. A peer does one thing: it generates greedily, to
exactly ``max_tokens`` tokens for each prompt of token ids, and says when each token came. What is made of those times
is the same for all of them, and done by the driver.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter

Ticks = list[list[float]]
"""By prompt, the seconds from the start to each of its tokens."""
Generate = Callable[[list[list[int]], int], tuple[list[list[int]], Ticks]]
"""(prompts, max_tokens) -> (the tokens of each prompt, and when they came)."""


class Clock:
    """Collects the tokens of prompts, with the time of each."""

    def __init__(self, num_prompts: int) -> None:
        self.start = perf_counter()
        self.tokens: list[list[int]] = [[] for _ in range(num_prompts)]
        self.ticks: Ticks = [[] for _ in range(num_prompts)]

    def add(self, prompt: int, *tokens: int) -> None:
        now = perf_counter() - self.start
        self.tokens[prompt] += tokens
        self.ticks[prompt] += [now] * len(tokens)

    def read(self) -> tuple[list[list[int]], Ticks]:
        return self.tokens, self.ticks


def serve(make: Callable[[str], Generate]) -> None:
    """Load the model in the folder ``argv[1]``, and answer requests until stdin ends.

    Whatever the peer's libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate = make(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            tokens, ticks = generate(request["prompts"], request["max_tokens"])
            answer: dict[str, object] = {"tokens": tokens, "ticks": ticks}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
