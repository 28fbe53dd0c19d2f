"""Ranks as processes, on this host or on several: started, handed calls in order, watched, and ended.

Knows who owns ranks and for how long; how they are heard and ended is `host.py`'s, how collectives are made
`comm`'s. The process that makes a :class:`ProcessRanks` is the host: it hands out calls, and hears from every rank
twice a second. A rank that raises, dies, stops, or keeps the others waiting fails the call; then all ranks end.
Ranks end by themselves when their host is gone. Nothing is left behind: no process, no socket file, and no shared
memory, which has no name and ends with the last rank.
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
from narrows.ranks.children import Children, end_children, ending, spawn
from narrows.ranks.host import Host
from narrows.ranks.launch import Launch, find_host
from narrows.ranks.messages import BEAT, END, FAILED, HELLO, Failure, hello
from narrows.ranks.timing import TIMING, Timing

__all__ = ["ProcessRanks", "serve_node"]

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
        launch: for ranks on several hosts, this host's part; None starts all ranks here.
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
        self._host = Host(mesh, timeout_s, launch, once, timing)
        # For an owner who forgets to close. The finalizer may run inside any code, so it only leaves a note.
        weakref.finalize(self, setattr, self._host, "forgotten", True).atexit = False
        atexit.register(_end_at_exit, weakref.ref(self._host))
        try:
            self._host.start(checked=checked, num_threads=num_threads, device=device)
            said = self._host.call(None, (make,), {}).result()
        except BaseException as error:
            self._host.end(error)
            raise
        self.transport = "; ".join(dict.fromkeys(said))
        """How collectives travel, for people: through shared memory, or why not."""

    @property
    def mesh(self) -> Mesh:
        return self._host.mesh

    @property
    def pids(self) -> tuple[int, ...]:
        """The process of each rank, on its host."""
        return self._host.pids

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, as soon as it is known, be they idle; None while they live."""
        return self._host.failure

    def silence_s(self) -> tuple[float, ...]:
        """For how long nothing has been heard of each rank, in seconds: below 1 while they live and are not stopped."""
        return self._host.silence_s()

    def submit(self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """Every rank calls its worker's method of that name; returns at once: the next call can be made meanwhile.

        Returns:
            a future whose ``result(timeout)`` is the list of the ranks' results, in rank order. It raises the first
            error of any rank in this call or an earlier one, of its own type if that can be pickled, else as
            RankError; RankError if a rank is gone, or if the ranks were closed before the call was done.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: an argument cannot be pickled; no rank has been called.
        """
        return self._host.call(method.__name__, args, kwargs)

    def submit_first(
        self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[list[T]]:
        """As :meth:`submit`, but the list holds rank 0's result alone; the other ranks say nothing once done."""
        return self._host.call(method.__name__, args, kwargs, first_only=True)

    def close(self) -> None:
        """Ends the ranks; calls that are not done fail with RankError. Closing again does nothing."""
        self._host.end(None)

    def __enter__(self) -> ProcessRanks[Worker]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.end(error)


def serve_node(launch: Launch) -> int:
    """Starts this node's ranks for the host on another node, and ends them when it says so; its exit code.

    Raises:
        RankError: the host is not there, or went away.
    """
    contact = find_host(launch)
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(None, launch.node, os.getpid())))
    except (OSError, EOFError) as error:
        raise RankError(f"node {launch.node} cannot reach its host at {contact.address}: {error}") from None
    children: Children = {}
    try:
        spawn(launch.ranks, launch.node, contact, children)
        code, why = _obey(channel, children, contact.timing.beat_s)
    except EOFError:
        raise RankError(f"node {launch.node}: the host at {contact.address} is gone") from None
    finally:
        end_children(children, contact.timing.grace_s)
        channel.close()
    if why:
        print(f"narrows: node {launch.node} was ended by its host: {why}", file=sys.stderr)
    return code


def _obey(channel: Channel, children: Children, beat_s: float) -> tuple[int, str]:
    """Waits for the host's word. A rank that ends is told to it: it may never have reached the host."""
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


def _end_at_exit(host: weakref.ref[Host]) -> None:
    if (alive := host()) is not None:
        alive.end(None)
