"""Channels between processes, and packed calls: keys, partial messages, ends, and objects that are sent once."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from patience import PATIENCE_S

from narrows.ranks.channel import Channel, listen
from narrows.ranks.packing import Packer, Unpacker, pack

KEY = b"k" * 32


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as threads:
        port = listener.getsockname()[1]
        there = threads.submit(Channel.connect, "127.0.0.1", port, KEY)
        here = Channel.accept(listener.accept()[0], KEY)
        both = here, there.result(PATIENCE_S)
    yield both
    for channel in both:
        channel.close()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    here, there = pair
    large = bytes(range(256)) * 40_000
    sender = threading.Thread(target=lambda: [here.send(b"a", b"x" * i) for i in range(50)] + [here.send(b"b", large)])
    sender.start()
    assert [there.receive(PATIENCE_S) for _ in range(50)] == [(b"a", b"x" * i) for i in range(50)]
    assert there.receive(PATIENCE_S) == (b"b", large)
    sender.join()
    there.try_send(b"c")
    assert here.receive(PATIENCE_S) == (b"c", b"")
    assert here.address == there.address == "127.0.0.1"


def test_a_partial_message_is_kept_until_it_is_whole(pair: tuple[Channel, Channel]) -> None:
    here, there = pair
    here._sock.sendall(b"a" + (6).to_bytes(8, "big") + b"abc")
    assert there.receive(0.1) is None
    here._sock.sendall(b"def")
    assert there.receive(PATIENCE_S) == (b"a", b"abcdef")


def test_ending_a_connection_wakes_both_ends(pair: tuple[Channel, Channel]) -> None:
    here, there = pair
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(here.receive, 10)
        time.sleep(0.05)
        here.shut()
        with pytest.raises(EOFError):
            waiting.result(PATIENCE_S)
    with pytest.raises(EOFError):
        there.receive(PATIENCE_S)
    with pytest.raises(OSError):
        [there.send(b"a", b"x" * 1000) for _ in range(1000)]
    there.try_send(b"a")  # says nothing


def test_try_send_drops_a_message_that_would_block(pair: tuple[Channel, Channel]) -> None:
    """A heartbeat must not wait for a peer that does not read."""
    here, _ = pair
    with ThreadPoolExecutor(1) as threads:
        stuck = threads.submit(here.send, b"a", b"x" * 50_000_000)
        time.sleep(0.2)
        assert not stuck.done()
        here.try_send(b"b")
        assert not stuck.done()
        here.shut()
        with pytest.raises(OSError):
            stuck.result(PATIENCE_S)


@pytest.mark.parametrize("wrong", ["connects", "listens"])
def test_another_key_is_refused(wrong: str) -> None:
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as threads:
        port = listener.getsockname()[1]
        there = threads.submit(Channel.connect, "127.0.0.1", port, b"?" * 32 if wrong == "connects" else KEY)
        with pytest.raises(EOFError, match="another key"):
            Channel.accept(listener.accept()[0], b"?" * 32 if wrong == "listens" else KEY)
        with pytest.raises((EOFError, OSError)):
            there.result(PATIENCE_S)


def test_the_listener_proves_the_key() -> None:
    """So that a process does not talk to a stranger that listens there."""
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as threads:
        there = threads.submit(Channel.connect, "127.0.0.1", listener.getsockname()[1], KEY)
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"n" * 32)
            sock.recv(64)
            sock.sendall(b"m" * 32)
            with pytest.raises(EOFError, match="another key"):
                there.result(PATIENCE_S)


def test_a_listener_binds_only_its_address() -> None:
    with listen("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", listener.getsockname()[1]), 1):
            pass


# --- packed calls


@dataclass(frozen=True)
class Table:
    numbers: tuple[int, ...]


def test_tensors_keep_bits_dtype_and_shape() -> None:
    wide = torch.arange(12.0).view(3, 4)
    tensors = [
        wide,
        wide.T[1:],  # not contiguous
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 3, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.tensor([1.0]).to(torch.float8_e4m3fn),
    ]
    with torch.inference_mode():
        tensors.append(torch.ones(2) * 3)
    again = pickle.loads(pack({"all": tensors}))["all"]
    for x, y in zip(tensors, again, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(x.float(), y.float())
        y.zero_()  # its own memory
    assert wide[0, 1] == 1


def test_objects_are_packed_once_by_identity() -> None:
    packer, unpack = Packer((Table,)), Unpacker()
    table, twin = Table(tuple(range(10_000))), Table(tuple(range(10_000)))
    first = pack(("step", (1, [table, table])), packer)
    (kept,) = packer.take_new()
    assert len(first) < 200 < len(kept)
    unpack.keep(kept)
    _, (_, (a, b)) = unpack(first)
    assert a is b and a == table
    assert pack(("step", (2, table)), packer) and packer.take_new() == []
    assert unpack(pack(("step", table), packer))[1] is a
    pack(twin, packer)
    (more,) = packer.take_new()
    unpack.keep(more)
    assert unpack(pack(twin, packer)) is not a


def test_a_numbered_object_is_kept() -> None:
    """Else a new object at the same address would get its number."""
    packer = Packer((Table,))
    numbers = set()
    for i in range(50):
        table = Table((i,))
        numbers.add(packer.number_of(table))
        del table
    assert len(numbers) == 50
