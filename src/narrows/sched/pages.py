"""The pages of one attention group's KV cache: which requests hold them, and which can be found by their tokens.

Page 0 is never given out: it is the null page, where dummy rows are written. A page that is full and
whose tokens are known has a hash, chained over the tokens before it. Once no request holds it, it can still be found
until its room is needed; the page that was unused for longest goes first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from narrows.errors import ConfigError

__all__ = ["PagePool", "num_pages_for", "page_hash"]


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that ``num_tokens`` tokens need."""
    return -(-num_tokens // page_size)


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128 bits for a page's tokens and, through ``parent`` (first page: ``b""``), for all tokens before them.

    A cryptographic hash (BLAKE2b), since a client that could make two texts collide would read another's cache.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages ``1 .. num_pages - 1``, given out lowest first so that runs are repeatable.

    Each is free, or held by one or more, or cached and held by none.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"a KV cache of {num_pages} pages holds nothing: page 0 is the null page, so 2 are needed"
            )
        self.num_pages = num_pages
        # Pages never taken are a number, not a list: a small model's cache has billions of pages on a large device.
        self._fresh = 1
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # cached, unused longest first

    @property
    def num_free(self) -> int:
        """Pages that can be taken: the free ones, and the cached ones without a holder."""
        return self.num_pages - self._fresh + len(self._free) + len(self._unheld)

    @property
    def num_used(self) -> int:
        """Pages that requests hold."""
        return self.num_pages - 1 - self.num_free

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` pages to write; the caller has checked that so many are free."""
        assert count <= self.num_free, f"{count} pages requested, {self.num_free} free"
        return tuple(self._take() for _ in range(count))

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._fresh < self.num_pages:
            page = self._fresh
            self._fresh += 1
        else:
            page, _ = self._unheld.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._holders[page] = 1
        return page

    def find(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The cached pages of the longest prefix of ``hashes``; holds none of them."""
        pages: list[int] = []
        for key in hashes:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def num_holders(self, page: int) -> int:
        """How often a page is held: by so many requests."""
        return self._holders[page]

    def num_unheld(self, pages: Iterable[int]) -> int:
        """How many of these cached pages have no holder: holding them makes so many fewer free."""
        return sum(page in self._unheld for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Hold cached pages, to read only."""
        for page in pages:
            assert page in self._hash_of, "only a page that is never written again is shared"
            self._unheld.pop(page, None)
            self._holders[page] += 1

    def register(self, page: int, key: bytes) -> None:
        """A held page is full and will be found by its hash, unless another page of the same content is already."""
        assert self._holders[page], "a page without a holder cannot have been written"
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key] = page
            self._hash_of[page] = key

    def hash_of(self, page: int) -> bytes | None:
        """The key of a cached page; None for others."""
        return self._hash_of.get(page)

    def give_back(self, pages: Sequence[int]) -> None:
        """Release pages. The last ones are evicted first, since a page is found only through those before it."""
        for page in reversed(pages):
            assert self._holders[page] > 0, "a page was given back twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._hash_of:
                self._unheld[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Forget all cached pages; held ones stay held."""
        self._free.extend(self._unheld)
        self._unheld.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every page is free, cached or held, and held exactly as often as ``held`` lists it."""
        free, unheld, counts = set(self._free), set(self._unheld), Counter(held)
        in_use = set(self._holders)
        assert len(free) == len(self._free) and 0 not in free | unheld | in_use, "a page was given back twice"
        assert not (free & unheld or free & in_use or unheld & in_use), "a page is free and in use"
        assert max(free | unheld | in_use, default=0) < self._fresh <= self.num_pages, (
            "a page is in use and was never taken"
        )
        assert len(free) + len(unheld) + len(in_use) == self._fresh - 1, "a page is lost"
        assert counts == {page: self._holders[page] for page in in_use}, "the holders of a page were counted wrongly"
        assert {page: key for key, page in self._page_of.items()} == self._hash_of, "a hash finds another page"
        assert unheld <= self._hash_of.keys() and not free & self._hash_of.keys(), "a free page can be found"
        assert all(counts[page] == 1 or page in self._hash_of for page in counts), "a page still written is shared"
