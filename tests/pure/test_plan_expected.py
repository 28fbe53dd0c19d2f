"""Buckets that are planned ahead: those that steps need, each once, likely ones first."""

from __future__ import annotations

import doctest
import itertools

import pytest

from narrows.layout import split_evenly
from narrows.plan import expected
from narrows.plan.cache import PlanKey
from narrows.plan.expected import expected_decodes, expected_keys


def test_doctests() -> None:
    result = doctest.testmod(expected)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_every_evenly_split_step_has_a_bucket(num_groups: int) -> None:
    keys = list(expected_keys(num_groups, most_decoding=24, rows_per_step=100))
    assert len(keys) == len(set(keys)) and all(key.rows <= 128 for key in keys)
    for rows in range(1, 25):
        assert PlanKey.of("decode", split_evenly(rows, num_groups), rows) in keys
    for rows, logit_rows in itertools.product(range(1, 101), (0, 1, 7)):
        if logit_rows <= rows:
            assert PlanKey.of("prefill", split_evenly(rows, num_groups), logit_rows) in keys
    phases = [key.phase for key in keys]
    assert phases == sorted(phases), "decode before prefill"
    decode = [key.rows for key in keys if key.phase == "decode"]
    assert decode == sorted(decode)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_decode_steps_grow_by_one_row_and_find_their_buckets(num_groups: int) -> None:
    steps = list(expected_decodes(num_groups, most=24))
    assert [sum(rows) for rows in steps] == list(range(1, 25))
    assert all(max(rows) - min(rows) <= 1 for rows in steps)
    keys = set(expected_keys(num_groups, most_decoding=24, rows_per_step=24))
    assert {PlanKey.of("decode", rows, sum(rows)) for rows in steps} <= keys
