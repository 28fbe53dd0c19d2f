"""Ranks as processes, on this host or on several.

The process that makes a :class:`ProcessRanks` is the coordinator: it hands out calls, and hears from every rank twice a
second. A rank that raises, dies, stops, or keeps the others waiting fails the call; then all ranks end. Ranks end by
themselves when their coordinator is gone. Nothing is left behind: no process, no socket file, and no shared memory,
which has no name and ends with the last rank.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, TypeVar

from narrows.comm.communicator import Communicator
from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.ranks.channel import Channel
from narrows.ranks.coordinator import Coordinator
from narrows.ranks.launch import Launch, find_coordinator
from narrows.ranks.messages import BEAT, END, FAILED, HELLO, Failure, hello
from narrows.ranks.spawn import Processes, end_processes, ending, spawn
from narrows.ranks.timing import TIMING, Timing

__all__ = ["ProcessRanks", "run_node"]

Worker = TypeVar("Worker")
P = ParamSpec("P")
T = TypeVar("T")


class ProcessRanks(Generic[Worker]):
    """Rank processes that stay: one worker per rank, and calls that every rank does in the order they were made.

    Args:
        make: builds the worker of a rank, in that rank's process; it may use collectives. It is pickled, as arguments
            and results of calls are: a function or class of a module that the ranks can import, or a partial of one.
        checked: compare what each rank comes to a collective with, before any data is sent.
        timeout_s: how long a rank that lives may keep the others waiting at a collective. One that is killed, stopped
            or unreachable, or that waits for others in vain, is named within 10 s whatever this is.
        num_threads: torch threads per rank.
        launch: for ranks on several hosts, this process's part; None starts all ranks here.
        once: arguments of these types are sent to the ranks the first time only; they must not change.
        device: of the tensors in collectives.
        timing: the durations by which ranks are judged.

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
    ) -> None:
        self._coordinator = Coordinator(mesh, timeout_s, launch, once, timing)
        # For an owner who forgets to close. The finalizer may run inside any code, so it only leaves a note.
        weakref.finalize(self, setattr, self._coordinator, "forgotten", True).atexit = False
        atexit.register(_end_at_exit, weakref.ref(self._coordinator))
        try:
            self._coordinator.start(checked=checked, num_threads=num_threads, device=device)
            said = self._coordinator.call(None, (make,), {}).result()
        except BaseException as error:
            self._coordinator.end(error)
            raise
        self.transport = "; ".join(dict.fromkeys(said))
        """How collectives travel, for people: through shared memory, or why not."""

    @property
    def mesh(self) -> Mesh:
        return self._coordinator.mesh

    @property
    def pids(self) -> tuple[int, ...]:
        """The process id of each rank, on its host."""
        return self._coordinator.pids

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, as soon as it is known, be they idle; None while they live."""
        return self._coordinator.failure

    def silence_s(self) -> tuple[float, ...]:
        """For how long nothing has been heard of each rank, in seconds: below 1 while they live and are not stopped."""
        return self._coordinator.silence_s()

    def submit(self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """Every rank calls its worker's method of that name; returns at once: the next call can be made meanwhile.

        Returns:
            a future whose ``result(timeout)`` is the list of the ranks' results, in rank order. It raises the first
            error of any rank in this call or an earlier one, of its own type if that can be pickled, else as
            RankError; RankError if a rank is gone, or if the ranks were closed before the call was done.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: an argument cannot be pickled; no rank has been called.
        """
        return self._coordinator.call(method.__name__, args, kwargs)

    def submit_first(
        self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`, but the list holds rank 0's result alone; the other ranks say nothing once done."""
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


def run_node(launch: Launch) -> int:
    """Runs this node's ranks until the coordinator, on another host, ends them; returns its exit code.

    Raises:
        RankError: the coordinator was not found, or is gone.
    """
    contact = find_coordinator(launch)
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(None, launch.node, os.getpid())))
    except (OSError, EOFError) as error:
        raise RankError(f"node {launch.node} cannot reach its coordinator at {contact.address}: {error}") from None
    children: Processes = {}
    try:
        spawn(launch.ranks, launch.node, contact, children)
        code, why = _obey(channel, children, contact.timing.beat_s)
    except EOFError:
        raise RankError(f"node {launch.node}: the coordinator at {contact.address} is gone") from None
    finally:
        end_processes(children, contact.timing.grace_s)
        channel.close()
    if why:
        print(f"narrows: node {launch.node} was ended by its coordinator: {why}", file=sys.stderr)
    return code


def _obey(channel: Channel, children: Processes, beat_s: float) -> tuple[int, str]:
    """Waits until the coordinator ends this node. Reports ranks that end, since they may never have connected."""
    told: set[int] = set()
    while True:
        message = channel.receive(beat_s)
        if message is not None and message[0] == END:
            code, why = pickle.loads(message[1])
            return code, why
        for rank, child in children.items():
            if child.poll() is not None and rank not in told:
                told.add(rank)
                text = f"rank {rank} (pid {child.pid}) {ending(child)}"
                channel.try_send(FAILED, pickle.dumps(Failure(0, None, "", text, "")))
        channel.try_send(BEAT)


def _end_at_exit(coordinator: weakref.ref[Coordinator]) -> None:
    if (alive := coordinator()) is not None:
        alive.end(None)
