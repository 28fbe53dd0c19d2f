"""Memory that recorded walks share: what is held stays, what is not is taken again, and a new walk begins anew."""

from __future__ import annotations

import torch

from narrows.engine.scratch import Scratch


def test_memory_is_taken_again_once_no_view_of_it_is_left() -> None:
    scratch = Scratch(1 << 20)
    like = torch.empty(6, 8, dtype=torch.bfloat16)
    a = scratch.take(like)
    assert a is not None and a.shape == (6, 8) and a.dtype == torch.bfloat16 and a.data_ptr() % 64 == 0
    at, part = a.data_ptr(), a.view(48)[40:]
    b = scratch.take(like)
    assert b is not None and b.data_ptr() >= at + a.nbytes
    del a
    c = scratch.take(like)
    assert c is not None and c.data_ptr() not in (at, b.data_ptr()), "a view is left"
    part.fill_(7)
    b.fill_(1)
    c.fill_(2)
    assert part.tolist() == [7] * 8
    del part
    d = scratch.take(like)
    assert d is not None and d.data_ptr() == at


def test_other_sizes_and_strides_lie_apart_and_what_does_not_fit_is_refused() -> None:
    scratch = Scratch(4096)
    column = torch.empty_strided((4, 3), (1, 4), dtype=torch.float32)
    a = scratch.take(column)
    assert a is not None and a.stride() == (1, 4) and scratch.used == 64
    assert scratch.take(torch.empty(2000, dtype=torch.uint8)) is not None
    assert scratch.take(torch.empty(4000, dtype=torch.uint8)) is None and scratch.used == 64 + 2048


def test_a_walk_begins_from_the_front_whoever_holds_what_was_there() -> None:
    scratch = Scratch(1 << 16)
    first = scratch.take(torch.empty(100))
    assert first is not None
    scratch.begin()
    again = scratch.take(torch.empty(3, dtype=torch.float64))
    assert again is not None and again.data_ptr() == first.data_ptr() and scratch.used == 64
