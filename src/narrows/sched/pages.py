"""The page pool of one attention group: which pages of its KV cache are free. Knows ints only.

Page 0 is never given out: it is the null page, where rows that stand for nothing are written.
"""

from __future__ import annotations

from narrows.errors import ConfigError

__all__ = ["PagePool", "num_pages_for"]


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that ``num_tokens`` tokens need."""
    return -(-num_tokens // page_size)


class PagePool:
    """Pages ``1 .. num_pages - 1``, given out lowest first so that runs are repeatable."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"a KV cache of {num_pages} pages holds nothing: page 0 is the null page, so 2 are needed"
            )
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` pages; the caller has checked that so many are free."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, pages: tuple[int, ...]) -> None:
        self._free.extend(sorted(pages, reverse=True))
        self.check_integrity()

    def check_integrity(self) -> None:
        """No page is free twice, none is the null page."""
        assert len(set(self._free)) == len(self._free) and 0 not in self._free, "a page was given back twice"
