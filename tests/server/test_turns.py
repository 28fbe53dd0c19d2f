"""A round of the event loop runs one piece of any backlog; and concurrent equal calls are shared."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from raw_client import AtOnce, Clock, RawClient, Wire
from test_connections import CHUNKED, get, make_connection

from narrows.server.http.connection_limits import Listener
from narrows.server.http.round_robin import RoundRobin, WorkKind
from narrows.server.workers import SharedCall


def in_rounds(work: Callable[[RoundRobin, Callable[[Any], None]], Awaitable[Any]]) -> list[list[Any]]:
    """The notes of each round of the event loop."""
    rounds: list[list[Any]] = [[]]

    async def run() -> None:
        doing = asyncio.ensure_future(work(RoundRobin(), lambda what: rounds[-1].append(what)))  # type: ignore[arg-type]
        while not doing.done():
            await asyncio.sleep(0)
            rounds.append([])
        await doing

    asyncio.run(run())
    return rounds


def test_each_round_runs_one_of_the_waiting_pieces() -> None:
    async def work(turns: RoundRobin, note: Callable[[Any], None]) -> None:
        async def one(number: int) -> None:
            for _ in range(3):
                await turns.wait(WorkKind.RUNNING)
                note(number)

        for number in range(20):
            turns.call(WorkKind.NEW, lambda number=number: note(-number))  # type: ignore[misc]
        await asyncio.gather(*(one(number) for number in range(1, 20)))
        assert not turns.num_waiting

    rounds = in_rounds(work)
    noted = [what for each in rounds for what in each]
    assert sorted(noted) == sorted([-number for number in range(20)] + list(range(1, 20)) * 3)
    assert max(map(len, rounds)) == 1


def test_no_kind_waits_for_all_of_another() -> None:
    order: list[WorkKind] = []

    async def work(turns: RoundRobin, note: Callable[[Any], None]) -> None:
        for kind in (WorkKind.NEW,) * 50 + (WorkKind.PROBE, WorkKind.RUNNING):
            turns.call(kind, lambda kind=kind: order.append(kind))  # type: ignore[misc]
        while turns.num_waiting:
            await asyncio.sleep(0)

    in_rounds(work)
    assert len(order) == 52 and order.index(WorkKind.PROBE) <= 2 and order.index(WorkKind.RUNNING) <= 2


def test_cancelled_or_failing_piece_costs_no_turn() -> None:
    done: list[int] = []

    async def run() -> None:
        turns = RoundRobin()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

        async def one(number: int) -> None:
            await turns.wait(WorkKind.RUNNING)
            done.append(number)

        tasks = [asyncio.ensure_future(one(number)) for number in range(100)]
        await asyncio.sleep(0)
        for task in tasks[1:99]:
            task.cancel()
        turns.call(WorkKind.NEW, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        rounds = 0
        while not tasks[-1].done():
            await asyncio.sleep(0)
            rounds += 1
        assert rounds < 8

    asyncio.run(run())
    assert done == [0, 99]


def test_turns_work_in_another_event_loop() -> None:
    turns = RoundRobin()

    async def leave() -> None:
        for _ in range(3):
            turns.call(WorkKind.NEW, lambda: None)

    asyncio.run(leave())  # ends before all had their turn
    asyncio.run(asyncio.wait_for(turns.wait(WorkKind.NEW), 10))


def test_a_door_lets_a_few_in_at_a_time() -> None:
    made: list[int] = [0]

    class Guest(asyncio.Protocol):
        def __init__(self) -> None:
            made[-1] += 1

    async def run() -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.listen(100)
            clients = [socket.create_connection(bound.getsockname()) for _ in range(60)]
            loop = asyncio.get_running_loop()
            door = Listener(loop, bound, Guest)
            while sum(made) < 60:
                await asyncio.sleep(0)
                made.append(0)
            door.close()
            late = socket.create_connection(bound.getsockname())
            for _ in range(10):
                await asyncio.sleep(0)
            await door.wait_closed()
            for each in (*clients, late):
                each.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert max(made) <= 4 and sum(made) == 60


def test_a_question_to_health_waits_for_no_request() -> None:
    kinds: list[WorkKind] = []

    class Noted(AtOnce):
        def call(self, kind: WorkKind, work: Callable[[], None]) -> None:
            kinds.append(kind)

    for data in (b"GET /health HTTP/1.1\r\n", b"GET /metrics", b"POST /v1/completions HTTP/1.1\r\n", b"G"):
        connection, _ = make_connection(Clock(), Wire(), turns=Noted())
        connection.data_received(data)
    assert kinds == [WorkKind.PROBE, WorkKind.PROBE, WorkKind.NEW, WorkKind.NEW]


def test_input_waits_for_its_turn_and_reading_pauses() -> None:
    waiting: list[Callable[[], None]] = []

    class Later(AtOnce):
        def call(self, kind: WorkKind, work: Callable[[], None]) -> None:
            waiting.append(work)

    connection, wire = make_connection(Clock(), Wire(), turns=Later())
    connection.data_received(b"GARBAGE")
    assert wire.paused
    connection.data_received(b"\r\n\r\n")  # was on its way
    assert len(waiting) == 1 and not wire.written
    waiting[0]()
    assert wire.written.startswith(b"HTTP/1.1 400 ") and not wire.paused


def test_a_body_in_tiny_chunks_is_refused_before_it_is_read(served: Any) -> None:
    counts: list[int] = []
    head = CHUNKED + b"Content-Type: application/json\r\n\r\n"
    for chunk, count in ((b"1\r\n \r\n", 90_000), (b"28\r\n%s\r\n" % (b" " * 40), 2000)):
        with RawClient(served.port) as client:
            client.send(head + chunk * count)
            answer = client.answer()
            assert answer.status == 400 and "in chunks of" in answer.message
            counts.append(answer.status)
    assert get(served, "/health").status == 200


@pytest.mark.parametrize("size", [1, 300])
def test_a_body_in_some_small_or_many_fair_chunks_is_read(served: Any, size: int) -> None:
    text = b'{"prompt": "hi"}' + b" " * (900 if size == 1 else 90_000)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for at in range(0, len(text), size)
                      for part in (text[at : at + size],))  # fmt: skip
    with RawClient(served.port) as client:
        client.send(CHUNKED + b"Content-Type: application/json\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert client.answer().status == 200


def test_shared_call_begins_after_its_requests() -> None:
    calls: list[int] = []

    async def run() -> None:
        go_on = asyncio.Event()

        async def call() -> int:
            calls.append(len(calls))
            number = len(calls)
            await go_on.wait()
            return number

        shared = SharedCall(call, 0.0, RoundRobin())
        first = [asyncio.ensure_future(shared.get()) for _ in range(50)]
        while not calls:
            await asyncio.sleep(0)
        second = [asyncio.ensure_future(shared.get()) for _ in range(50)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(calls) == 1, "one at a time"
        second[0].cancel()
        go_on.set()
        assert set(await asyncio.gather(*first)) == {1}
        assert set(await asyncio.gather(*second[1:])) == {2}

    asyncio.run(run())
    assert len(calls) == 2


def test_waiters_of_a_shared_result_resume_one_per_round() -> None:
    async def work(turns: RoundRobin, note: Callable[[Any], None]) -> None:
        async def call() -> int:
            return 1

        shared = SharedCall(call, 0.0, turns)

        async def ask(number: int) -> None:
            await shared.get()
            note(number)

        await asyncio.gather(*(ask(number) for number in range(20)))

    rounds = in_rounds(work)
    assert sorted(number for found in rounds for number in found) == list(range(20))
    assert max(map(len, rounds)) == 1


def test_a_call_that_fails_is_made_again_for_the_next() -> None:
    outcomes = [ValueError("no"), 5]

    async def call() -> Any:
        found = outcomes.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def run() -> None:
        shared = SharedCall(call, 0.0, RoundRobin())
        with pytest.raises(ValueError, match="no"):
            await shared.get()
        assert await shared.get() == 5

    asyncio.run(run())


def test_a_flood_of_metrics_and_documents_costs_a_few(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[int] = []
    info = served.lab.backend.info
    monkeypatch.setattr(served.lab.backend, "info", lambda: described.append(1) or info())
    request = b"GET /server_info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    clients = [RawClient(served.port) for _ in range(30)]
    for client in clients:
        client.send(request)
    assert [client.answer().status for client in clients] == [200] * 30
    for client in clients:
        client.close()
    assert len(described) <= 10, "most shared one"
    documents = {get(served, "/openapi.json").body for _ in range(3)}
    assert len(documents) == 1 and served.lab.app.state.document in documents
