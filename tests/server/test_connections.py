"""Clients that send incomplete requests or do not read: each is ended, and no other client waits."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn
from patience import eventually
from raw_client import Answer, AtOnce, Clock, RawClient, Wire, post
from uvicorn.server import ServerState

from narrows.server.http.connection_limits import ConnectionSlots, unread_bytes
from narrows.server.http.connections import Connection
from narrows.server.http.round_robin import RoundRobin
from narrows.server.options import ConnectionLimits

HEAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
TEXT = {"prompt": "hi", "max_tokens": 4}


def get(served: Any, path: str) -> Answer:
    with RawClient(served.port) as client:
        return client.get(path)


@contextmanager
def held(served: Any, count: int, **fields: Any) -> Iterator[list[RawClient]]:
    """Clients whose requests are under way, until the block ends."""
    backend = served.lab.backend
    backend.gate.clear()
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(served.port)) for _ in range(count)]
        for client in clients:
            client.send(post("/v1/completions", {**TEXT, **fields}))
        eventually(lambda: backend.num_live == count)
        try:
            yield clients
        finally:
            backend.gate.set()


# Heads


@pytest.mark.parametrize("piece", [1000, 1 << 20])
@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /", b"a" * 500),
        (HEAD + b"X: ", b"a" * 500),
        (HEAD, b"a" * 500),
        (HEAD, b"X: a\r\n" * 100),
        (HEAD, b"X: " + b"a" * 495 + b"\r\n"),
        (CHUNKED + b"\r\n1;", b"a" * 500),
        (CHUNKED + b"\r\n1\r\na\r\n0\r\nX: ", b"a" * 500),
        (CHUNKED + b"\r\n1\r\na\r\n0\r\n", b"X: a\r\n" * 100),
    ],
    ids=["target", "value", "name", "small-fields", "large-fields", "chunk-extension", "trailer", "trailers"],
)
def test_a_head_without_end_is_refused(served: Any, begin: bytes, more: bytes, piece: int) -> None:
    data = begin + more * 600  # 300 kB of a large one
    with RawClient(served.port) as client:
        for at in range(0, len(data), piece):
            if client.has_come() or not client.send(data[at : at + piece]):
                break
        answer = client.answer()
        assert answer.status == 431 and answer.headers["connection"] == "close"
        assert ("65536 bytes" in answer.message) or ("128 headers" in answer.message)
        assert client.rest() == b""
    assert get(served, "/health").status == 200


def test_a_large_head_is_let_in(served: Any) -> None:
    with RawClient(served.port) as client:
        client.send(HEAD + b"X: " + b"a" * 65_000 + b"\r\n\r\n")
        assert client.answer().status == 200
        client.send(HEAD + b"X: a\r\n" * 127 + b"\r\n")
        assert client.answer().status == 200
        client.send(HEAD + b"X: a\r\n" * 128 + b"\r\n")
        assert client.answer().status == 431
    for fields in (b"X: " + b"a" * 66_000 + b"\r\n", (b"X: " + b"a" * 660 + b"\r\n") * 100):
        with RawClient(served.port) as client:
            client.send(HEAD + fields + b"\r\n")  # complete as soon as it is seen
            assert client.answer().status == 431


def test_bytes_after_a_body_do_not_count_as_head(served: Any) -> None:
    with RawClient(served.port) as client:
        client.send(CHUNKED + b'\r\n10\r\n{"prompt": "hi"}\r\n0\r\nContent-Type: application/json\r\n\r\n')
        assert client.answer().status == 415


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", b""), (b"\r\n\r\n", b""), (b"GET / HT", b"HTTP/1.1 408 "), (HEAD + b"X", b"HTTP/1.1 408 ")],
)
def test_half_a_head_is_answered_408_and_silence_with_nothing(sent: bytes, status: bytes) -> None:
    loop = Clock()
    connection, wire = make_connection(loop, Wire())
    assert [timer.seconds for timer in loop.timers] == [10.0]
    if sent:
        connection.data_received(sent)
    loop.ring()
    assert wire.written[:13] == status and (b"10 s" in wire.written) == bool(status)
    if status:  # closed for writing, and in a moment altogether
        assert wire.ended and not wire.aborted
        loop.ring()
        assert wire.aborted
    else:
        assert wire.closing
    assert not loop.timers


def test_a_head_sent_byte_by_byte_has_one_deadline() -> None:
    loop = Clock()
    connection, wire = make_connection(loop, Wire())
    at_connect = list(loop.timers)
    connection.data_received(b"G")
    begun = list(loop.timers)
    assert len(begun) == 1 and begun != at_connect  # a head that begins late has its time too
    for byte in (HEAD + b"X: a\r\n" * 50)[1:]:
        connection.data_received(bytes([byte]))
        assert loop.timers == begun
    loop.ring()
    assert wire.written.startswith(b"HTTP/1.1 408 ")


def test_silent_and_slow_clients_are_hung_up_on(make_served: Callable[..., Any]) -> None:
    served = make_served(head_timeout_s=0.2, keep_alive_s=0.2)
    with RawClient(served.port) as silent, RawClient(served.port) as idle, RawClient(served.port) as slow:
        assert idle.get("/health").status == 200
        assert any(slow.has_come() or not slow.send(byte) for byte in slowly(HEAD + b"X" * 2000))
        assert slow.rest()[:13] in (b"HTTP/1.1 408 ", b"") and silent.rest() == idle.rest() == b""


def slowly(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        yield data[at : at + 1]
        asyncio.run(asyncio.sleep(0.01))


# Bodies


def test_an_announced_but_unsent_body_ends_the_request(make_served: Callable[..., Any]) -> None:
    served = make_served(body_timeout_s=0.2)
    with RawClient(served.port) as client:
        client.send(post("/v1/completions", TEXT)[:-10])
        answer = client.answer()
        assert answer.status == 408 and "bytes so far" in answer.message
        assert answer.headers["connection"] == "close" and client.rest() == b""


def test_a_slow_but_steady_body_is_accepted(make_served: Callable[..., Any]) -> None:
    served = make_served(body_timeout_s=4.0, body_bytes_per_s=2)
    data = post("/v1/completions", {**TEXT, "user": "x" * 60})
    with RawClient(served.port) as client:
        client.send(data[:-30])
        for piece in (data[-30:-20], data[-20:-10], data[-10:]):  # 4.5 s in all, each of which wins 5 s back
            time.sleep(1.5)
            client.send(piece)
        assert client.answer().status == 200


def test_a_fast_start_does_not_extend_the_stall_limit(make_served: Callable[..., Any]) -> None:
    served = make_served(body_timeout_s=0.3, body_bytes_per_s=1)
    with RawClient(served.port) as client:
        client.send(post("/v1/completions", {**TEXT, "user": "x" * 400})[:-1])
        assert client.answer().status == 408


def test_rest_of_a_refused_body_ends_the_connection(make_served: Callable[..., Any]) -> None:
    served = make_served(head_timeout_s=0.3, keep_alive_s=60.0)
    with RawClient(served.port) as client:
        client.send(CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n")
        assert client.answer().status == 501
        assert any(client.has_come() or not client.send(b"1\r\na\r\n") for _ in slowly(b" " * 2000))
        assert client.rest() == b""


def test_garbage_in_the_rest_of_a_body_gets_no_second_answer(served: Any) -> None:
    with RawClient(served.port) as client:
        client.send(CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n")
        assert client.answer().status == 501
        client.send(b"no size of a chunk\r\n")
        assert client.rest() == b""


# Many requests on one connection


def test_requests_in_a_row_are_answered_in_order(served: Any) -> None:
    with RawClient(served.port) as client:
        client.send((HEAD + b"\r\n") * 3 + HEAD.replace(b"models", b"nothing") + b"\r\n")
        assert [client.answer().status for _ in range(4)] == [200, 200, 200, 404]
        assert client.get("/health").status == 200


def test_requests_without_end_are_not_kept(make_served: Callable[..., Any]) -> None:
    served = make_served(max_pipelined=5)
    with held(served, 1) as (client,):
        assert client.send((HEAD + b"\r\n") * 50_000)  # 2 MB, of which next to nothing is kept
        served.lab.backend.gate.set()
        answers = [client.answer() for _ in range(6)]
        assert [answer.status for answer in answers] == [200] * 6 and answers[-1].headers["connection"] == "close"
        assert client.rest() == b""


def test_bodies_that_wait_behind_a_request_are_read_later() -> None:
    """Two megabytes of small requests behind one that runs: after 64 kB, no more is read until the next one begins."""
    small = post("/tokenize", {"prompt": "x" * 20_000})

    async def main() -> list[bool]:
        connection, wire = make_connection(asyncio.get_running_loop(), Wire(), app=never_answers)
        connection.data_received(HEAD + b"\r\n")
        paused = []
        for _ in range(6):
            connection.data_received(small)
            paused.append(wire.paused)
        connection.connection_lost(None)
        await asyncio.gather(*connection.tasks)
        return paused

    assert asyncio.run(main()) == [False, False, False, False, True, True]


async def never_answers(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def test_a_disconnect_behind_waiting_requests_is_detected(make_served: Callable[..., Any]) -> None:
    served = make_served()
    with held(served, 1, stream=True) as (client,):
        client.send(HEAD + b"\r\n")
        client.send(HEAD + b"\r\n")
        client.close()
        eventually(lambda: served.lab.backend.num_live == 0)


def test_garbage_behind_a_request_does_not_get_into_its_answer(make_served: Callable[..., Any]) -> None:
    served = make_served()
    for stream in (False, True):
        with held(served, 1, stream=stream) as (client,):
            client.send(b"\0\1\2 no HTTP\r\n\r\n" * 10)
            served.lab.backend.gate.set()
            answer = client.answer()
            assert answer.status == 200 and b"no HTTP" not in answer.body and b"error" not in answer.body
            assert client.rest() == b""


def test_non_http_gets_400(served: Any) -> None:
    for junk in (
        b"\x16\x03\x01\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    ):
        with RawClient(served.port) as client:
            client.send(junk)
            answer = client.answer()
            assert answer.status == 400 and "HTTP/1.1" in answer.message and client.rest() == b""


def test_expect_100_continue_is_answered(served: Any) -> None:
    head, _, body = post("/v1/completions", TEXT, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with RawClient(served.port) as client:
        client.send(head + b"\r\n\r\n")
        assert client.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert client.answer().status == 200


# Answers that are not read


def make_connection(
    loop: Any, wire: Wire, app: Any = None, turns: RoundRobin | None = None, **limits: Any
) -> tuple[Connection, Wire]:
    """A connection without a server."""
    config = uvicorn.Config(app or never_answers, interface="asgi3", log_level="error", ws="none", lifespan="off")
    made = Connection(
        config,
        ServerState(),
        {},
        loop,
        limits=ConnectionLimits(**limits),
        slots=ConnectionSlots(1, 1),
        turns=turns or AtOnce(),
    )
    made.connection_made(wire)  # type: ignore[arg-type]
    return made, wire


def test_a_reader_that_reads_nothing_is_disconnected() -> None:
    loop = Clock()
    connection, wire = make_connection(loop, Wire())
    loop.timers.clear()  # that for its first head
    wire.unread = 100_000
    connection.pause_writing()
    assert [timer.seconds for timer in loop.timers] == [60.0]
    for unread in (99_000, 98_999, 5):  # it still reads, if slowly
        wire.unread = unread
        loop.ring()
        assert not wire.aborted and len(loop.timers) == 1
    connection.resume_writing()
    assert not loop.timers
    wire.unread = 100_000
    connection.pause_writing()
    loop.ring()
    assert wire.aborted


def test_a_closing_connection_waits_as_long_for_its_reader() -> None:
    loop = Clock()
    connection, wire = make_connection(loop, Wire())
    loop.timers.clear()  # that for its first head
    wire.unread = 9
    connection.timeout_keep_alive_handler()
    assert wire.closing and not wire.aborted and len(loop.timers) == 1
    connection.resume_writing()  # little is left now, but something is
    assert len(loop.timers) == 1
    loop.ring()
    assert wire.aborted


def test_an_aborted_response_waits_as_long_for_its_reader() -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        wire.unread = 9

    async def main() -> None:
        connection, _ = make_connection(asyncio.get_running_loop(), wire, app=breaks_off, send_timeout_s=0.01)
        connection.data_received(HEAD + b"\r\n")
        while not wire.aborted:
            await asyncio.sleep(0.01)
        assert wire.closing
        connection.connection_lost(None)

    wire = Wire()
    asyncio.run(asyncio.wait_for(main(), 20))


def test_bytes_in_the_systems_buffers_count_as_unread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(listening.getsockname())
        writer, _ = listening.accept()
        with writer:
            writer.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    writer.send(b"x" * 10_000)
            wire = Wire(writer)
            wire.unread = 5
            before = unread_bytes(wire)  # type: ignore[arg-type]
            assert before > 5
            reader.recv(2000, socket.MSG_WAITALL)
            eventually(lambda: reader.recv(100_000) != b"" and unread_bytes(wire) < before)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_never_read_frees_its_place(make_served: Callable[..., Any], stream: bool) -> None:
    served = make_served(max_connections=1, send_timeout_s=0.3)
    served.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    served.lab.text = "word " * 200
    body = {"prompt": "hi", "n": 128, "max_tokens": 150, "logprobs": 5, "stream": stream}
    with RawClient(served.port, receive_buffer=4096) as client:
        client.send(post("/v1/completions", body))
        eventually(lambda: len(served.lab.backend.submitted) == 128)
        eventually(lambda: get(served, "/v1/models").status == 200)
        assert not client.rest().endswith((b"0\r\n\r\n", b"}"))


# ConnectionSlots


def test_probes_are_answered_when_all_places_work(make_served: Callable[..., Any]) -> None:
    served = make_served(max_connections=3, reserved_slots=2)
    with held(served, 3) as clients:
        for _ in range(5):
            refused = get(served, "/v1/models")
            assert refused.status == 503 and "--max-connections" in refused.message
            assert refused.headers["connection"] == "close" and refused.headers["retry-after"] == "1"
            for path in ("/health", "/health/", "/metrics"):
                probe = get(served, path)
                assert probe.status == 200 and probe.headers["connection"] == "close"
        silent = [RawClient(served.port) for _ in range(10)]
        assert get(served, "/health").status == 200
        served.lab.backend.gate.set()
        assert [client.answer().status for client in clients] == [200] * 3
        for client in silent:
            client.close()
    assert get(served, "/v1/models").status == 200


def test_a_client_that_is_still_sending_can_read_the_503(make_served: Callable[..., Any]) -> None:
    served = make_served(max_connections=1, reserved_slots=1)
    with held(served, 1):
        for more in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with RawClient(served.port) as client:
                assert client.send(post("/v1/completions", {"prompt": "x" * 10_000_000}) + more), "hung up on"
                answer = client.answer()
                assert answer.status == 503 and answer.headers["connection"] == "close"
                assert client.rest() == b""
        with RawClient(served.port) as client:
            client.send(post("/v1/completions", {**TEXT, "stream": True}, version="1.0"))
            assert client.answer().status == 503 and client.rest() == b""


def test_reserved_connection_becomes_ordinary_when_a_slot_is_free(
    make_served: Callable[..., Any],
) -> None:
    served = make_served(max_connections=1, reserved_slots=1)
    with held(served, 1) as (client,), RawClient(served.port) as late:
        served.lab.backend.gate.set()
        assert client.answer().status == 200
        assert late.get("/v1/models").status == 200


def test_the_oldest_silent_connections_make_room(
    make_served: Callable[..., Any],
    said: list[str],
) -> None:
    served = make_served(max_connections=10, head_timeout_s=100.0)
    with held(served, 1) as (busy,), ExitStack() as stack:
        silent = [stack.enter_context(RawClient(served.port)) for _ in range(100)]
        for client in silent[50:]:
            client.send(b"GET / HT")
        eventually(lambda: all(client.has_come() for client in silent[:91]))
        assert not any(client.has_come() for client in silent[91:])
        assert get(served, "/v1/models").status == 200
        served.lab.backend.gate.set()
        assert busy.answer().status == 200
    assert len([line for line in said if "all 10 connections" in line]) == 1


def test_a_server_out_of_descriptors_continues(served: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files: list[int] = []
    waiting = [socket.socket() for _ in range(20)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(sock.fileno() for sock in waiting) + 1, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                files.append(os.open(os.devnull, os.O_RDONLY))
        for sock in waiting:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", served.port))
        assert [sock.recv(1) for sock in waiting] == [b""] * 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in files:
            os.close(each)
        for sock in waiting:
            sock.close()
    assert get(served, "/health").status == 200


# HTTP/1.0


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_streams_are_chunked_only_for_http_1_1(served: Any, version: str) -> None:
    with RawClient(served.port) as client:
        client.send(post("/v1/completions", {**TEXT, "stream": True}, version=version))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.sock.recv(1)
        assert head.startswith(b"HTTP/1.1 200 ")
        if version == "1.1":
            assert b"transfer-encoding: chunked\r\n" in head and not client.sock.recv(10).startswith(b"data")
            return
        assert b"transfer-encoding" not in head.lower() and b"connection: close\r\n" in head
        body = client.rest()
    events = body.split(b"\n\n")
    assert len(events) > 2 and all(event.startswith(b"data: ") for event in events[:-1])
    assert events[-2:] == [b"data: [DONE]", b""]


def test_a_whole_answer_to_http_1_0_has_its_length(served: Any) -> None:
    for request, status in ((post("/v1/completions", TEXT, version="1.0"), 200), (b"GET /no HTTP/1.0\r\n\r\n", 404)):
        with RawClient(served.port) as client:
            client.send(request)
            answer = client.answer()
            assert answer.status == status and int(answer.headers["content-length"]) == len(answer.body)
            assert client.rest() == b""
