"""The calls that ranks have not finished yet, and the failure that ends them all."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from narrows.errors import RankError

__all__ = ["PendingCalls"]


class _Call:
    def __init__(self, num_results: int) -> None:
        self.results: list[Any] = [None] * num_results
        self.missing = num_results
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()  # a rank cannot skip what the others do: no cancelling


class PendingCalls:
    """Calls by number, from 0 on. Any thread may use it."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.failure: BaseException | None = None
        """The first failure of any rank; every later call fails with it."""
        self.failed_at = 0.0
        self._calls: dict[int, _Call] = {}
        self._closed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._calls)

    def refusal(self, name: str | None) -> BaseException | None:
        """Why no call is accepted any more; None while calls are accepted."""
        with self._lock:
            if self.failure is None and self._closed:
                return RankError(f"{name} was called on closed ranks")
            return self.failure

    def add(self, num_results: int) -> Future[list[Any]]:
        """Registers the next call, before it is sent to any rank."""
        with self._lock:
            call = self._calls[self.num_calls] = _Call(num_results)
            self.num_calls += 1
        return call.future

    def done(self, rank: int, number: int, result: Any) -> None:
        """Takes a rank's result; the last one completes the call."""
        with self._lock:
            call = self._calls.get(number)
            if call is None:
                return
            call.results[rank] = result
            call.missing -= 1
            if call.missing:
                return
            del self._calls[number]
        call.future.set_result(call.results)

    def fail(self, error: BaseException, number: int, now: float) -> None:
        """Fails call ``number`` and all later ones. Only the first failure counts."""
        with self._lock:
            if self.failure is not None or self._closed:
                return
            self.failed_at, self.failure = now, error
            undone = [self._calls.pop(i) for i in sorted(self._calls) if i >= number]
        for call in undone:
            call.future.set_exception(error)

    def close(self) -> None:
        """Fails the calls that are left, and accepts no more."""
        with self._lock:
            self._closed = True
            undone, self._calls = list(self._calls.values()), {}
            error = self.failure or RankError("the ranks were closed before they had done all calls")
        for call in undone:
            call.future.set_exception(error)
