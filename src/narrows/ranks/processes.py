"""Ranks as processes, on this host or on several.

The process that makes a :class:`ProcessRanks` is the coordinator: it hands out calls, and hears from every rank twice a
second. A rank that raises, dies, stops, or keeps the others waiting fails the call; then all ranks end. Ranks end by
themselves when their coordinator is gone. Nothing is left behind: no process, no socket file, and no shared memory,
which has no name and ends with the last rank.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from narrows.comm.communicator import Communicator
from narrows.layout import Mesh
from narrows.ranks.coordinator import Coordinator
from narrows.ranks.launch import Launch
from narrows.ranks.messages import Made
from narrows.ranks.start_clock import StartClock
from narrows.ranks.timing import TIMING, Timing

__all__ = ["ProcessRanks"]

Worker = TypeVar("Worker")
P = ParamSpec("P")
T = TypeVar("T")


class ProcessRanks(Generic[Worker]):
    """Rank processes with one worker each, which every call runs on, in the order of the calls.

    Args:
        make: builds the worker of a rank, in that rank's process; it may use collectives. It is pickled, as arguments
            and results of calls are: a function or class of a module that the ranks can import, or a partial of one.
        checked: compare the ranks' fingerprints of a collective before any data is sent.
        timeout_s: how long a rank that lives may keep the others waiting at a collective. A rank that is killed,
            stopped, unreachable or stuck is named within 10 s whatever this is.
        num_threads: torch threads per rank.
        launch: for ranks on several hosts, this process's part; None starts all ranks here.
        once: arguments of these types are sent to the ranks the first time only; they must not change.
        device: of the tensors in collectives.
        timing: the durations by which ranks are judged.
        fork_self: the process that forks this host's ranks (`fork_server.py`) may be a fork of this one, so they see
            what it has imported and set; else it is a new interpreter.
        meanwhile: called when this host's processes are there, before they are ready; it may start threads.
        clock: gets the phases of the start.

    Raises:
        the first error of ``make`` on any rank; RankError if a rank does not start.
    """

    def __init__(
        self,
        mesh: Mesh,
        make: Callable[[Communicator], Worker],
        *,
        checked: bool = False,
        timeout_s: float = 60.0,
        num_threads: int = 1,
        launch: Launch | None = None,
        once: tuple[type, ...] = (),
        device: str = "cpu",
        timing: Timing = TIMING,
        fork_self: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
        clock: StartClock | None = None,
    ) -> None:
        self.mesh = mesh
        self._coordinator = Coordinator(mesh, timeout_s, launch, once, timing)
        # For ranks that are never closed. The finalizer may run inside any code, so it only sets a flag.
        weakref.finalize(self, setattr, self._coordinator, "forgotten", True).atexit = False
        atexit.register(_end_at_exit, weakref.ref(self._coordinator))
        try:
            self._coordinator.start(
                checked=checked,
                num_threads=num_threads,
                device=device,
                fork_self=fork_self,
                modules=_modules_of(make),
                meanwhile=meanwhile,
            )
            if clock is not None:
                clock.end("rank processes")
            made: list[Made] = self._coordinator.call(None, (make,), {}).result()
            if clock is not None:
                clock.end("weights on the ranks")
                clock.of_ranks("meeting the other ranks", max(each.met_s for each in made))
                clock.of_ranks("reading and packing", max(each.made_s for each in made))
        except BaseException as error:
            self._coordinator.end(error)
            raise
        self.pids = self._coordinator.pids
        """The process id of each rank, on its host."""
        self.transport = "; ".join(dict.fromkeys(each.transport for each in made))
        """How collectives travel, for people: through shared memory, or why not."""

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, as soon as it is known, even while they are idle; None while they live."""
        return self._coordinator.failure

    def silence_s(self) -> tuple[float, ...]:
        """Seconds since each rank was last heard: below 1 while it lives and is not stopped."""
        return self._coordinator.silence_s()

    def submit(self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """Calls the worker's method of that name on every rank, without waiting for it.

        Returns:
            a future whose ``result(timeout)`` is the list of the ranks' results, in rank order. It raises the first
            error of any rank in this call or an earlier one: of its own type if it can be pickled, else RankError. It
            raises RankError if a rank is gone, or if the ranks were closed before the call was done.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: an argument cannot be pickled; no rank has been called.
        """
        return self._coordinator.call(method.__name__, args, kwargs)

    def submit_first(
        self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`, but only rank 0 sends its result, the one element of the list."""
        return self._coordinator.call(method.__name__, args, kwargs, first_only=True)

    def close(self) -> None:
        """Ends the ranks; calls that are not done fail with RankError. Closing again does nothing."""
        self._coordinator.end(None)

    def __enter__(self) -> ProcessRanks[Worker]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._coordinator.end(error)


def _modules_of(make: Callable[..., Any]) -> tuple[str, ...]:
    """The module of narrows that ranks import to run ``make``. Others are theirs alone to import."""
    while isinstance(make, partial):
        make = make.func
    name = getattr(make, "__module__", None) or ""
    return (name,) if name.startswith("narrows.") else ()


def _end_at_exit(coordinator: weakref.ref[Coordinator]) -> None:
    if (alive := coordinator()) is not None:
        alive.end(None)
