"""The interface of ranks, whether they are threads or processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["Ranks"]

Worker_co = TypeVar("Worker_co", covariant=True)
P = ParamSpec("P")
T = TypeVar("T")


class Ranks(Protocol[Worker_co]):
    """One worker per rank. A call passes a method, as ``Worker.method``; each rank calls its own worker's method of
    that name."""

    transport: str
    """How collectives travel, for people."""

    def submit(
        self, method: Callable[Concatenate[Worker_co, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """Calls the method on every rank; a future of the results in rank order, or of the first error of any rank."""
        ...

    def submit_first(
        self, method: Callable[Concatenate[Worker_co, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`, but the list needs to hold only rank 0's result, as its first element."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, as soon as it is known; None while they live."""
        ...

    def silence_s(self) -> tuple[float, ...]:
        """Seconds since each rank was last heard."""
        ...

    def close(self) -> None:
        """Ends the ranks. Closing again does nothing."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
