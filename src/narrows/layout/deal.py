"""Dealing whole units (rows, heads, experts, columns) to ranks, unevenly where they do not divide. Knows only ints."""

from __future__ import annotations

__all__ = ["Span", "deal", "starts"]

Span = tuple[int, int]
"""A half-open range ``(start, stop)``."""


def deal(units: int, parts: int) -> tuple[int, ...]:
    """How many of ``units`` each of ``parts`` gets: contiguous, as even as whole units allow, the larger shares first.

    >>> deal(1023, 8)
    (128, 128, 128, 128, 128, 128, 128, 127)
    >>> deal(1, 4), deal(0, 2)
    ((1, 0, 0, 0), (0, 0))
    """
    share, extra = divmod(units, parts)
    return (share + 1,) * extra + (share,) * (parts - extra)


def starts(counts: tuple[int, ...]) -> tuple[Span, ...]:
    """The half-open range of each share when the shares are laid end to end.

    >>> starts((2, 0, 3))
    ((0, 2), (2, 2), (2, 5))
    """
    spans: list[Span] = []
    at = 0
    for count in counts:
        spans.append((at, at + count))
        at += count
    return tuple(spans)
