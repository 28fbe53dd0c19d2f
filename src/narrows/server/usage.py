"""Counts the tokens of one request as ``usage`` reports them. Knows numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Count", "usage"]


@dataclass(slots=True)
class Count:
    """Of one text: tokens up to where it ends, those of its reasoning, and those of its prompt that were cached."""

    prompt: int = 0
    """Which prompt it belongs to."""
    generated: int = 0
    reasoning: int = 0
    cached: int = 0


def usage(prompt_tokens: int, texts: Iterable[Count]) -> dict[str, Any]:
    """As the API spells it. A prompt counts once, however many texts it gets.

    >>> usage(5, [Count(generated=2, cached=4), Count(generated=3)])["total_tokens"]
    10
    """
    counts = list(texts)
    generated = sum(count.generated for count in counts)
    cached: dict[int, int] = {}
    for count in counts:
        cached[count.prompt] = max(cached.get(count.prompt, 0), count.cached)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning for count in counts)},
    }
