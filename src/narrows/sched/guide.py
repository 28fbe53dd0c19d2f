"""The Protocol by which a grammar limits the next token of a constrained request.

A guided request's next row is scheduled only when its last token is known, since which tokens are allowed depends on
it, and when their mask is ready. Making a mask may take long, so a guide makes it elsewhere: the scheduler
never computes one, and a request whose mask is late waits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Guide"]


class Guide(Protocol):
    """The state of one request's constraint. Driven by the scheduler; one object per request.

    A class that inherits from this one, and has :meth:`allowed` and :meth:`advance` only, is a guide whose masks are
    always there.
    """

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit each: bit ``t % 8`` of byte ``t // 8`` is token ``t``'s.

        Read only while :attr:`ready`.
        """
        ...

    def advance(self, token: int) -> None:
        """Take in the token that was chosen. Returns at once; the next mask may come later."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is ready."""
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for the mask for so many seconds at most, or not at all if it is likely to take long; :attr:`ready`."""
        return self.ready

    def when_ready(self, call: Callable[[], None]) -> None:
        """``call`` runs once the mask is ready, on any thread, or at once. A later one replaces an earlier one."""
        call()

    def end(self) -> None:
        """No more masks are wanted."""
        return
