"""Counts the tokens of one request as ``usage`` reports them. Knows updates; not text."""

from __future__ import annotations

from typing import Any

from narrows.server.backend import Update

__all__ = ["UsageCount"]


class UsageCount:
    """``prompt_tokens`` counts each prompt once, however many texts it gets."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._cached: dict[int, int] = {}
        self._generated = 0
        self.reasoning = 0

    def add(self, prompt: int, update: Update) -> None:
        """An update of one text of the ``prompt``-th prompt."""
        self._generated += len(update.token_ids)
        if update.num_cached_prompt:
            self._cached[prompt] = max(self._cached.get(prompt, 0), update.num_cached_prompt)

    @property
    def value(self) -> dict[str, Any]:
        """As the API spells it."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
