"""The page pool: no page is given twice, none is lost, and never the null page."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import ConfigError
from narrows.sched.pages import PagePool, num_pages_for, page_hash


@pytest.mark.parametrize(
    ("num_tokens", "page_size", "pages"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (1, 1, 1), (1023, 16, 64)]
)
def test_num_pages_for_rounds_up(num_tokens: int, page_size: int, pages: int) -> None:
    assert num_pages_for(num_tokens, page_size) == pages


@pytest.mark.parametrize("num_pages", [0, 1])
def test_a_pool_without_usable_pages_is_refused(num_pages: int) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"a KV cache of {num_pages} pages holds nothing")):
        PagePool(num_pages)


def test_pages_go_out_lowest_first_and_never_the_null_page() -> None:
    pool = PagePool(5)
    assert pool.take(2) == (1, 2)
    assert pool.take(0) == ()
    assert pool.take(2) == (3, 4)
    assert pool.num_free == 0


def test_taking_too_many_pages_or_freeing_twice_is_an_assertion() -> None:
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="4 pages requested, 3 free"):
        pool.take(4)
    pages = pool.take(2)
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(pages)


@given(st.integers(2, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=30))
def test_every_page_is_free_or_out_and_never_both(num_pages: int, acts: list[tuple[bool, int]]) -> None:
    pool = PagePool(num_pages)
    out: list[tuple[int, ...]] = []
    for takes, number in acts:
        if takes and number <= pool.num_free:
            out.append(pool.take(number))
        elif out:
            pool.give_back(out.pop(number % len(out)))
        held = [page for pages in out for page in pages]
        pool.check_integrity(held)
        assert len(set(held)) == len(held) and set(held) <= set(range(1, num_pages))
        assert len(held) + pool.num_free == num_pages - 1


def test_cached_pages_are_evicted_least_recently_used_first() -> None:
    pool = PagePool(4)
    first = page_hash(b"", (1, 2))
    second = page_hash(first, (3, 4))
    pages = pool.take(3)
    pool.register(pages[0], first)
    pool.register(pages[1], second)
    pool.give_back(pages)
    pool.check_integrity(())
    assert pool.num_free == 3 and pool.find([first, second]) == pages[:2]
    assert pool.take(2) == (pages[2], pages[1]), "the free one, then the end of the text"
    assert pool.find([first, second]) == pages[:1]
    pool.share(pages[:1])
    pool.share(pages[:1])
    pool.check_integrity((*pages, pages[0]))
    with pytest.raises(AssertionError, match="1 pages requested, 0 free"):
        pool.take(1)


def test_a_page_hash_covers_all_tokens_before_it() -> None:
    keys = {page_hash(parent, tokens) for parent in (b"", page_hash(b"", (7,))) for tokens in ((1, 2), (2, 1), (258,))}
    assert len(keys) == 6


def test_a_page_that_is_still_written_is_never_shared() -> None:
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="never written again"):
        pool.share(pool.take(1))
