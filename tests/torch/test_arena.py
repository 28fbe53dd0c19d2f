"""The arena of captured steps: held memory stays, released memory is reused, and a new capture starts at the front."""

from __future__ import annotations

import torch

from narrows.engine.arena import Arena


def test_memory_is_reused_once_no_view_is_left() -> None:
    arena = Arena(1 << 20)
    like = torch.empty(6, 8, dtype=torch.bfloat16)
    a = arena.take(like)
    assert a is not None and a.shape == (6, 8) and a.dtype == torch.bfloat16 and a.data_ptr() % 64 == 0
    at, part = a.data_ptr(), a.view(48)[40:]
    b = arena.take(like)
    assert b is not None and b.data_ptr() >= at + a.nbytes
    del a
    c = arena.take(like)
    assert c is not None and c.data_ptr() not in (at, b.data_ptr()), "a view is left"
    part.fill_(7)
    b.fill_(1)
    c.fill_(2)
    assert part.tolist() == [7] * 8
    del part
    d = arena.take(like)
    assert d is not None and d.data_ptr() == at


def test_other_sizes_do_not_overlap_and_too_large_ones_are_refused() -> None:
    arena = Arena(4096)
    column = torch.empty_strided((4, 3), (1, 4), dtype=torch.float32)
    a = arena.take(column)
    assert a is not None and a.stride() == (1, 4) and arena.used == 64
    assert arena.take(torch.empty(2000, dtype=torch.uint8)) is not None
    assert arena.take(torch.empty(4000, dtype=torch.uint8)) is None and arena.used == 64 + 2048


def test_reset_starts_at_the_front() -> None:
    arena = Arena(1 << 16)
    first = arena.take(torch.empty(100))
    assert first is not None
    arena.reset()
    again = arena.take(torch.empty(3, dtype=torch.float64))
    assert again is not None and again.data_ptr() == first.data_ptr() and arena.used == 64
