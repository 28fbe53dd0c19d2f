"""Whole units (rows, heads, experts, columns) split over ranks as evenly as they go."""

from __future__ import annotations

__all__ = ["Span", "split_evenly", "starts"]

Span = tuple[int, int]
"""A half-open range ``(start, stop)``."""


def split_evenly(units: int, parts: int) -> tuple[int, ...]:
    """How many of ``units`` each of ``parts`` gets: contiguous, as even as whole units allow, the larger shares first.

    >>> split_evenly(1023, 8)
    (128, 128, 128, 128, 128, 128, 128, 127)
    >>> split_evenly(1, 4), split_evenly(0, 2)
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
