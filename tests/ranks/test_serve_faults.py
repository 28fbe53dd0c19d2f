"""A real server under faults of machines and users: each ends as documented, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from patience import PATIENCE_S, eventually
from server_process import ServerProcess, events

from narrows.cli.main import main

LONG = {"max_tokens": 1500, "ignore_eos": True}


def stream(server: ServerProcess, into: list[str], begun: threading.Event, **fields: object) -> None:
    """Reads a stream to its end, and then cuts it into lines, because other clients share this process."""
    body = {"prompt": "The sea", "temperature": 0, "stream": True, **fields}
    pieces: list[bytes] = []
    with (
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer,
        suppress(httpx.RemoteProtocolError),  # the server ended in the middle
    ):
        for piece in answer.iter_raw(1 << 14):
            pieces.append(piece)
            begun.set()
    into += b"".join(pieces).decode().splitlines()


def streaming(server: ServerProcess, **fields: object) -> tuple[threading.Thread, list[str]]:
    """A stream that has begun, read by a thread."""
    lines: list[str] = []
    begun = threading.Event()
    thread = threading.Thread(target=stream, args=(server, lines, begun), kwargs=fields, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE_S)
    return thread, lines


@contextmanager
def suspended(rank: int) -> Iterator[None]:
    """No text ends meanwhile, however fast the machine is. Seconds of it are forgiven; then the rank counts as dead."""
    os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)


def is_draining(answer: httpx.Response) -> bool:
    """Not another 503, as for a rank that is suspended."""
    return answer.status_code == 503 and answer.json()["error"]["code"] == "draining"


def test_a_killed_rank_ends_its_texts_turns_health_red_and_is_replaced_once(tmp_path: Path) -> None:
    with ServerProcess("--tp", "2", log=tmp_path / "log") as server:
        before = server.text(max_tokens=12)
        thread, lines = streaming(server, **LONG)
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        eventually(lambda: server.health().status_code == 503)
        thread.join(PATIENCE_S)
        *_, error = events(lines)
        assert "rank 1" in error["error"]["message"] and "SIGKILL" in error["error"]["message"]
        eventually(lambda: server.health().status_code == 200)
        assert server.health().json()["num_restarts"] == 1
        assert "started again" in server.said and "ready again" in server.said
        assert server.text(max_tokens=12) == before
        thread, lines = streaming(server, **LONG)
        os.kill(server.rank_pids()[0], signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 1, "ranks that fail twice in a minute are not started a third time"
        assert "rank 0" in server.said.splitlines()[-1]
        thread.join(PATIENCE_S)
        assert "rank 0" in events(lines)[-1]["error"]["message"]


def test_a_stopped_rank_turns_health_red_and_is_replaced_while_the_disk_for_logs_is_full() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 - the server's to write to
    with full, ServerProcess("--tp", "2", stderr=full) as server:
        before = server.text(max_tokens=8)
        thread, lines = streaming(server, **LONG)
        stopped = server.rank_pids()[0]
        os.kill(stopped, signal.SIGSTOP)  # there is a message, which cannot be written
        eventually(lambda: server.health().status_code == 503)
        assert "rank 0" in server.health().json()["error"]["message"]
        eventually(lambda: server.health().status_code == 200)
        thread.join(PATIENCE_S)
        assert "rank 0" in events(lines)[-1]["error"]["message"]
        assert server.text(max_tokens=8) == before and not Path(f"/proc/{stopped}").exists()
        assert server.stop() == 0


def test_an_idle_server_detects_a_death_and_ends_without_restart(tmp_path: Path) -> None:
    with ServerProcess("--no-restart", log=tmp_path / "log") as server:
        os.kill(server.rank_pids()[0], signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 1
        assert "rank 0" in server.said and "SIGKILL" in server.said


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_lets_texts_finish_refuses_new_ones_and_frees_the_port(
    number: int, running: Callable[[], set[int]]
) -> None:
    before = running()
    with ServerProcess("--tp", "2", "--drain-timeout", "900", "--batch-invariant") as server:
        expected = server.text(**LONG)
        streams = [streaming(server, **LONG) for _ in range(4)]
        with suspended(server.rank_pids()[0]):
            os.killpg(server.process.pid, number)  # as a terminal does: ranks get it too
            eventually(lambda: is_draining(server.health()))
            assert is_draining(server.complete(max_tokens=1))
        assert server.process.wait(PATIENCE_S) == 0
        for thread, lines in streams:
            thread.join(PATIENCE_S)
            *chunks, last = events(lines)
            assert last == "[DONE]" and "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert running() == before
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))


def test_a_second_signal_ends_a_drain_at_once() -> None:
    with ServerProcess("--drain-timeout", "900") as server:
        streaming(server, **LONG)
        with suspended(server.rank_pids()[0]):
            server.process.send_signal(signal.SIGINT)
            eventually(lambda: is_draining(server.health()))
            assert server.stop() == 1


def test_a_key_allows_any_host() -> None:
    with ServerProcess("--api-key", "secret") as server:
        key = {"Authorization": "Bearer secret", "Host": "box.lan"}
        assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200


@pytest.fixture(scope="module")
def hard_pressed() -> object:
    """One server for faults of users."""
    let_in = ("--allow-host", "box.lan", "--allow-origin", "https://app.example")
    with ServerProcess("--tp", "2", "--max-body-mb", "1", *let_in) as server:
        yield server
        assert server.stop() == 0


def test_on_loopback_only_local_hosts_and_origins_are_accepted(hard_pressed: ServerProcess) -> None:
    for headers, status in (
        ({}, 200),
        ({"Host": "box.lan:80", "Origin": "https://app.example"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
    ):
        assert httpx.get(f"{hard_pressed.url}/v1/models/", headers=headers).status_code == status


def rss_mb(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_a_client_that_vanishes_frees_its_pages(hard_pressed: ServerProcess) -> None:
    server = hard_pressed
    body = {"prompt": "The sea", "stream": True, "n": 4, **LONG}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        eventually(lambda: server.metric("requests_running") == 4)
        assert server.metric("kv_pages_used") > 0
    eventually(lambda: server.metric("kv_pages_used") == 0)
    asked = json.dumps({"prompt": "The sea", **LONG}).encode()  # one that does not stream
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
        eventually(lambda: server.metric("requests_running") == 1)
    eventually(lambda: server.metric("kv_pages_used") == 0)


@pytest.mark.parametrize("number", [2_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_thousands_of_junk_requests(hard_pressed: ServerProcess, number: int) -> None:
    server = hard_pressed
    bodies = [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": []}', b'{"prompt": {}}',
        b'{"prompt": "x", "n": 0}',
        b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "temperature": "hot"}', b'{"prompt": [1e99]}',
        b'{"prompt": "x", "seed": 1e400}', b'{"prompt": "x", "logit_bias": {"a": 1}}', b"[" * 5000,
        b'{"prompt": "x", "stop": 7}', b'{"prompt": "x", "model": "no"}', b'{"messages": []}', b'{"prompt": [99999]}',
        b'{"prompt": "x", "response_format": {"type": "regex", "pattern": "("}}',
    ]  # fmt: skip
    heads = [
        f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        for route in ("completions", "chat/completions")
        for body in bodies
    ]
    requests = [head.encode() + bodies[i % len(bodies)] for i, head in enumerate(heads)]
    before = rss_mb(server)

    def send(_: int) -> list[bytes]:
        statuses = []
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock,
            sock.makefile("rb") as answers,
        ):
            for request in requests * 5:
                sock.sendall(request)
                statuses.append(answers.readline().split()[1])
                length = 0
                while (line := answers.readline().strip().lower()) != b"":
                    if line.startswith(b"content-length:"):
                        length = int(line.split()[1])
                answers.read(length)
        return statuses

    with ThreadPoolExecutor(4) as pool:
        statuses = [status for found in pool.map(send, range(number // (5 * len(requests)))) for status in found]
    assert len(statuses) == number and set(statuses) == {b"400", b"404"}
    for garbage in (
        b"\x16\x03\x01" + os.urandom(400),
        b"GET / HTTP/9.9\r\n\r\n",
        os.urandom(5000),
        b"POST" + b"x" * 99999,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
            sock.sendall(garbage)
    assert server.text(max_tokens=4) and server.health().status_code == 200
    assert rss_mb(server) - before < 40


def test_a_body_of_100_mb_is_refused_and_takes_no_memory(hard_pressed: ServerProcess) -> None:
    server = hard_pressed
    before = rss_mb(server)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    for told, first in ((b"Content-Length: 104857600\r\n\r\n", b""), (b"Transfer-Encoding: chunked\r\n\r\n", chunk)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
            sock.sendall(head + told + first + chunk[:100])
            assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")
            with suppress(OSError):  # it has hung up, and takes no more in
                for _ in range(100):
                    sock.sendall(chunk)
    assert rss_mb(server) - before < 40 and server.text(max_tokens=4)


def test_a_slow_reader_does_not_block_others(hard_pressed: ServerProcess) -> None:
    server = hard_pressed
    body = b'{"prompt": "The sea", "stream": true, "max_tokens": 300, "ignore_eos": true, "n": 4, "logprobs": 5}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head.encode() + b"\r\n" + body)
        time.sleep(0.5)
        assert server.text(max_tokens=8)
        eventually(lambda: server.metric("requests_running") == 0)  # its texts are done, although no client reads them
        assert server.metric("kv_pages_used") == 0 and server.text(max_tokens=8)


def test_silent_connections_beyond_the_file_limit_and_a_drain_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this machine lets a process open too few files for a client of 1,100 connections")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 1024\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ServerProcess("--drain-timeout", "0.5", log=tmp_path / "log") as server, ExitStack() as stack:
        try:
            for index in range(1100):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S))
                sock.sendall(b"GET / HTTP/1.1\r\nHost: local"[: index % 2 * 99])
            assert server.health().status_code == 200 and server.text(max_tokens=4)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "may open 1024 files (ulimit -n), enough for 752 connections" in server.said
        assert server.said.count("all 752 connections are in use") == 1
        thread, lines = streaming(server, **LONG)
        assert server.stop() == 0
        thread.join(PATIENCE_S)
        assert "ended" in events(lines)[-1]["error"]["message"]


def test_wrong_starts_are_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in (
            (["narrows-demo", "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            (["narrows-demo", "--max-queue", "0"], "--max-queue is 0; it must be between 1 and"),
            (["narrows-demo", "--drain-timeout", "inf"], "--drain-timeout is inf; it must be between 0 and 86400"),
            (["narrows-demo", "--max-body-mb", "nan"], "--max-body-mb is nan; it must be between"),
            (["narrows-demo", "--request-timeout", "-1"], "--request-timeout is -1; it must be between"),
            (["narrows-demo", "--tp", "2", "--layout", "norm-before-gather"], "norm-before-gather"),
            (["no-such-model"], "no-such-model"),
            (["narrows-demo", "--api-key", ""], "API key"),
            (["narrows-demo", "--max-connections", "0"], "--max-connections is 0; it must be between 1 and"),
            (["narrows-demo", "--port", "0", "--max-connections", "1000000"], "files (ulimit -n), enough for"),
            (["narrows-demo", "--port", "0", "--allow-host", "http://x"], "--allow-host is 'http://x'; it must be"),
            (["narrows-demo", "--port", "0", "--allow-origin", "x.y/"], "--allow-origin is 'x.y/'; it must be"),
            (["narrows-demo", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        ):
            assert main(["serve", *options]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1, error
