"""Batches: the rows of a step, which of them have logits, and what references mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.sched.batch import Batch, Chunk, sample_ref, sample_slot


def chunk(request: int, start: int, rows: int, num_logits: int = 0) -> Chunk:
    tokens = tuple(range(100 * request + start, 100 * request + start + rows))
    return Chunk(request=request, start=start, tokens=tokens, pages=(1, 2), num_logits=num_logits)


@given(st.integers(0, 10**6))
def test_a_reference_is_no_token_id_and_encodes_its_slot(slot: int) -> None:
    assert sample_ref(slot) < 0
    assert sample_slot(sample_ref(slot)) == slot


def test_references_to_different_slots_differ() -> None:
    assert [sample_ref(slot) for slot in range(3)] == [-1, -2, -3]


@pytest.mark.parametrize(("rows", "num_logits"), [(0, 0), (2, 3), (2, -1)])
def test_a_chunk_without_rows_or_with_foreign_logits_is_an_assertion(rows: int, num_logits: int) -> None:
    with pytest.raises(AssertionError, match="a chunk has rows"):
        chunk(0, 0, rows, num_logits)


def test_rows_are_ordered_by_group_then_chunk_and_the_last_of_a_chunk_are_sampled() -> None:
    batch = Batch(
        groups=(
            (chunk(7, 4, 1, 1), chunk(8, 0, 3)),  # rows 0, 1 2 3
            (),
            (chunk(9, 2, 4, 2), chunk(5, 6, 1, 1)),  # rows 4 5 6 7, 8
        )
    )
    assert batch.group_rows == (4, 0, 5)
    assert (batch.num_rows, batch.num_logit_rows) == (9, 4)
    assert batch.logit_rows() == (0, 6, 7, 8)
    assert batch.samples() == ((7, 0), (9, 2), (5, 3))  # slots count logit rows, not samples


@pytest.mark.parametrize(
    ("groups", "phase"),
    [
        (((chunk(0, 3, 1, 1),), (chunk(1, 9, 1, 1),)), "decode"),
        (((chunk(0, 3, 1, 1),), ()), "decode"),
        (((chunk(0, 0, 1, 1),), ()), "prefill"),  # a prompt of one token
        (((chunk(0, 3, 2, 1),), ()), "prefill"),
        (((chunk(0, 3, 1, 1),), (chunk(1, 0, 4, 1),)), "prefill"),  # mixed
        (((chunk(0, 3, 1),), ()), "decode"),  # the last row but one of a prompt: the same work
    ],
)
def test_phase(groups: tuple[tuple[Chunk, ...], ...], phase: str) -> None:
    assert Batch(groups=groups).phase == phase


@given(st.lists(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=4), min_size=1, max_size=3))
def test_logit_rows_and_samples_agree_with_counting_row_by_row(plan: list[list[tuple[int, int]]]) -> None:
    number = iter(range(100))
    groups = tuple(tuple(chunk(next(number), 1, rows, min(logits, rows)) for rows, logits in group) for group in plan)
    batch = Batch(groups=groups)
    rows: list[tuple[int, bool, bool]] = []  # request, has logits, is sampled
    for group in groups:
        for part in group:
            for i in range(len(part.tokens)):
                asks = i >= len(part.tokens) - part.num_logits
                rows.append((part.request, asks, asks and i == len(part.tokens) - 1))
    asking = [row for row, (_, asks, _) in enumerate(rows) if asks]
    assert batch.num_rows == len(rows) and sum(batch.group_rows) == len(rows)
    assert batch.logit_rows() == tuple(asking)
    assert batch.num_logit_rows == len(asking)
    assert batch.samples() == tuple((rows[row][0], slot) for slot, row in enumerate(asking) if rows[row][2])
