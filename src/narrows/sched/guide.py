"""What a constrained request may generate next: the Protocol that a grammar fulfils. Knows no grammar.

A guided request's next row is scheduled only when its last token is known, since which tokens are allowed depends on
it.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Guide"]


class Guide(Protocol):
    """The state of one request's constraint. Driven by the scheduler; one object per request."""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit each: bit ``t % 8`` of byte ``t // 8`` is token ``t``'s."""
        ...

    def advance(self, token: int) -> None:
        """Take in the token that was chosen."""
        ...
