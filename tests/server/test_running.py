"""Updates of a request's generations reach the event loop in order; a backlog comes in parts."""

import asyncio
from collections.abc import Callable

from narrows.api import Generation, Update
from narrows.server.generation import RunningRequest
from narrows.server.http.round_robin import RoundRobin
from narrows.server.workers import LoopCalls


class Backend:
    """Keeps the callbacks of generations."""

    def __init__(self) -> None:
        self.deliver: list[Callable[[Update], None]] = []

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        self.deliver.append(deliver)
        return len(self.deliver) - 1


class Times:
    def first_token(self, seconds: float) -> None: ...
    def next_tokens(self, seconds: float, count: int) -> None: ...
    def ended(self, seconds: float, reason: str) -> None: ...


def test_unread_updates_come_in_parts_with_turns_between() -> None:
    asyncio.run(slow_reader())


async def slow_reader() -> None:
    backend = Backend()
    running = RunningRequest(backend, LoopCalls(asyncio.get_running_loop()), Times(), RoundRobin(), "a client")
    await running.submit([Generation(prompt=(1,), max_tokens=1000)] * 2, "prompt")
    for token in range(1000):
        for deliver in backend.deliver:
            deliver(Update(token_ids=(token,), finish_reason="length" if token == 999 else ""))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(others())
    parts, at = [], []
    async for part in running.updates():
        parts.append(part)
        at.append(turns)
    beside.cancel()
    assert [(index, update.token_ids[0]) for part in parts for index, update in part] == [
        (index, token) for token in range(1000) for index in range(2)
    ]
    assert max(map(len, parts)) <= 128
    assert at == sorted(set(at)), "others had a turn between any two parts"
