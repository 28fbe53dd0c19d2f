"""What whoever has ranks may ask of them: calls that every rank does in the order they were made. PURE.

Knows futures and workers' methods; not where ranks run.
"""

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
    """One worker per rank. A call names a method by itself, as ``Worker.method``: its name goes to the ranks, and each
    calls what its own worker has by that name."""

    transport: str
    """How collectives travel, for people."""

    def submit(
        self, method: Callable[Concatenate[Worker_co, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """Every rank calls the method; the results in rank order, or the first error of any rank."""
        ...

    def submit_first(
        self, method: Callable[Concatenate[Worker_co, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`, for who looks at rank 0's result, the first of the list, alone; there may be no others."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, as soon as it is known; None while they live."""
        ...

    def silence_s(self) -> tuple[float, ...]:
        """For how long nothing has been heard of each rank, in seconds."""
        ...

    def close(self) -> None:
        """Ends the ranks; again does nothing."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
