"""Connections beyond the limit: which gets a slot, which is closed for it, and how often the log says so."""

from __future__ import annotations

import resource

import pytest

from narrows.errors import ConfigError
from narrows.server.http import connection_limits as descriptors
from narrows.server.http.connection_limits import ConnectionSlots, connections_for, raise_descriptor_limit
from narrows.server.options import ConnectionLimits, ServerOptions


class Guest:
    """A connection."""

    def __init__(self) -> None:
        self.left = 0

    def make_room(self) -> None:
        self.left += 1


def guests(count: int) -> list[Guest]:
    return [Guest() for _ in range(count)]


def left(of: list[Guest]) -> list[int]:
    return [index for index, guest in enumerate(of) if guest.left]


def test_the_one_that_has_waited_longest_makes_room() -> None:
    slots, here = ConnectionSlots(4, 1), guests(4)
    assert all(slots.take(guest) for guest in here)
    slots.works(here[0])
    slots.works(here[1])
    slots.waits(here[0])  # it has been busy meanwhile: it waits only since now
    for _ in range(2):
        assert slots.take(new := Guest()) and slots.works(new)
    assert left(here) == [2, 3]
    assert slots.take(new := Guest()) and slots.works(new)
    assert left(here) == [0, 2, 3] and len(slots) == 4


def test_reserved_slots_are_used_when_none_is_idle() -> None:
    slots, here = ConnectionSlots(2, 2), guests(2)
    for guest in here:
        assert slots.take(guest) and slots.works(guest)
    first, second, third = guests(3)
    for guest in (first, second, third):
        assert slots.take(guest)
    assert first.left == 1 and not second.left and left(here) == []
    assert not slots.works(second) and not slots.works(third)
    assert not slots.take(Guest()) and len(slots) == 4
    slots.leave(here[0])
    assert slots.works(second) and not slots.works(third), "there is one slot, so one may move"
    slots.leave(second)
    slots.waits(here[1])
    assert slots.works(third) and not here[1].left
    assert slots.take(Guest())


def test_reserved_request_may_take_the_slot_of_an_idle_connection() -> None:
    slots, busy, late = ConnectionSlots(1, 1), Guest(), Guest()
    assert slots.take(busy) and slots.works(busy)
    assert slots.take(late)
    slots.waits(busy)
    assert slots.works(late) and busy.left


def test_a_connection_that_left_takes_no_slot() -> None:
    slots, old, new = ConnectionSlots(1, 1), Guest(), Guest()
    assert slots.take(old) and slots.take(new) and old.left
    for _ in range(2):
        slots.leave(old)
    slots.waits(old)
    assert len(slots) == 1 and slots.works(new)
    assert slots.take(Guest()) and old.left == 1


def test_full_slots_are_logged_once_until_free_for_a_minute(said: list[str]) -> None:
    now = [100.0]
    slots = ConnectionSlots(1, 1, clock=lambda: now[0])
    lines = []

    def come_and_go(after: float) -> None:
        """One slot is taken, another client comes ``after`` seconds later, and both leave."""
        now[0] += after
        pair = guests(2)
        for guest in pair:
            slots.take(guest)
        for guest in pair:
            slots.leave(guest)
        lines.append(len(said))

    for after in (0.0, 1.0, 59.0, 59.5, 60.0, 1.0, 3600.0):
        come_and_go(after)
    assert lines == [1, 1, 1, 1, 2, 2, 3]
    held = Guest()
    slots.take(held)
    slots.works(held)
    for _ in range(3):  # it is never free meanwhile
        now[0] += 1000.0
        slots.take(Guest())
    assert len(said) == 4
    assert "all 1 connections" in said[0] and "--max-connections" in said[0]


@pytest.mark.parametrize(
    ("descriptors_", "room"), [(1 << 20, 4096), (4368, 4096), (4367, 4095), (1024, 752), (256, 112), (33, 1)]
)
def test_connections_leave_room_for_other_files(descriptors_: int, room: int) -> None:
    found, line = connections_for(None, descriptors_)
    assert found == room
    if room == 4096:
        assert line == ""
    else:
        assert f"{descriptors_} files" in line and f"{room} connections" in line
    assert connections_for(1, descriptors_) == (1, "")
    with pytest.raises(ConfigError, match=r"--max-connections is 2000000; .* lower the flag"):
        connections_for(2_000_000, descriptors_)
    with pytest.raises(ConfigError, match="raise the limit to 33 at least"):
        connections_for(None, 32)


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    endless, most = resource.RLIM_INFINITY, 1 << 20
    for (soft, hard), wanted, limit in (
        ((1024, 4096), (4096, 4096), 4096),
        ((4096, 4096), None, 4096),
        ((1024, endless), (most, endless), most),
        ((1024, most * 2), (most, most * 2), most),
        ((endless, endless), None, most),
    ):
        was_set: list[tuple[int, int]] = []
        monkeypatch.setattr(descriptors.resource, "getrlimit", lambda which, it=(soft, hard): it)
        monkeypatch.setattr(descriptors.resource, "setrlimit", lambda which, it, to=was_set: to.append(it))
        assert raise_descriptor_limit() == limit
        assert was_set == ([wanted] if wanted else [])


def test_unraisable_soft_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(descriptors.resource, "setrlimit", refuse)
    assert raise_descriptor_limit() == 256


def test_limits_that_let_nothing_in_are_refused() -> None:
    for name in ("max_connections", "head_timeout_s", "body_bytes_per_s"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be more than 0"):
            ConnectionLimits(**{name: 0})
    assert ServerOptions().connections == ConnectionLimits()
