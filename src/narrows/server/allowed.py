"""A constraint to some tokens, the same at every place of a text: ``allowed_token_ids``. Knows token ids only."""

from __future__ import annotations

from collections.abc import Iterable

from narrows.sched.guide import Guide

__all__ = ["AllowedTokens"]


class AllowedTokens(Guide):
    """Only ``tokens`` are ever generated."""

    def __init__(self, tokens: Iterable[int], vocab_size: int) -> None:
        mask = bytearray(-(-vocab_size // 32) * 4)
        for token in tokens:
            mask[token // 8] |= 1 << token % 8
        self._mask = bytes(mask)

    def allowed(self) -> bytes:
        """The mask, one bit per token."""
        return self._mask

    def advance(self, token: int) -> None:
        """Nothing changes."""
