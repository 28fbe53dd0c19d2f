"""The main program of a rank process: runs the coordinator's calls in order until the coordinator ends it.

The main thread runs the calls. A second thread listens to the coordinator and sends it a heartbeat twice a second, with
the collective that this rank waits in. That thread also ends the process, because a main thread that waits in a
collective cannot be woken in any other way.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, NoReturn

import torch

from narrows.comm.communicator import Communicator
from narrows.comm.connect import connect_process
from narrows.comm.device import rank_device
from narrows.comm.transport import PeersLostError
from narrows.ranks.affinity import pin
from narrows.ranks.channel import Channel
from narrows.ranks.launch import Launch, find_coordinator, join_store
from narrows.ranks.messages import (
    BEAT,
    CALL,
    DONE,
    END,
    FAILED,
    HELLO,
    KEEP,
    SETUP,
    Contact,
    Failure,
    Made,
    Setup,
    hello,
)
from narrows.ranks.packing import Unpacker, pack
from narrows.ranks.timing import Timing
from narrows.ranks.watchdog import Report

__all__ = ["PROGRAM", "boot", "boot_line", "run_rank", "run_torchrun_rank"]

PROGRAM = (
    "import json, sys; args = json.loads(sys.stdin.readline() or sys.exit(1)); sys.path[:] = args['path']; "
    "from narrows.imports import quick_imports\nwith quick_imports():\n"
    "  from narrows.ranks.rank_process import boot\nboot(args)"
)
"""What ``python -c`` runs in a rank process.

Its arguments, and the key above all, come through stdin, since other users can read a command line. The parent's main
module is not run again, so it needs no ``__main__`` guard.
"""


def boot(args: dict[str, Any]) -> NoReturn:
    """Runs a rank process that the coordinator or a node has started; ``args`` as in :func:`boot_line`."""
    # A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group. The parent handles them, and
    # ends its ranks when their work is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    contact = Contact(
        address=args["address"], port=args["port"], key=bytes.fromhex(args["key"]), timing=Timing(**args["timing"])
    )
    run_rank(contact, args["rank"], args["node"], tuple(args["local"]), explain=False)


def boot_line(contact: Contact, rank: int, node: int, local: tuple[int, int]) -> str:
    """The arguments of :func:`boot` as a line of JSON. ``local``: local rank and local world size."""
    args: dict[str, Any] = {"address": contact.address, "port": contact.port, "key": contact.key.hex()}
    args["timing"] = asdict(contact.timing)
    return json.dumps(args | {"rank": rank, "node": node, "local": local, "path": sys.path}) + "\n"


def run_torchrun_rank(launch: Launch) -> NoReturn:
    """Turns a process that torchrun started into its rank; ends it with the coordinator's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    local = launch.local_rank, launch.local_world_size
    run_rank(find_coordinator(launch), launch.ranks[0], launch.node, local, explain=True)


def run_rank(contact: Contact, rank: int, node: int, local: tuple[int, int], *, explain: bool) -> NoReturn:
    """Runs a rank until the coordinator ends it. ``explain``: print to stderr why it ends, if not as planned."""
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(rank, node, os.getpid())))
    except (OSError, EOFError) as error:
        _end(1, f"rank {rank} cannot reach its coordinator at {contact.address} port {contact.port}: {error}")
    link = _CoordinatorLink(channel, rank, contact.timing, explain)
    threading.Thread(target=link.listen, name=f"narrows rank {rank} listens", daemon=True).start()
    _Rank(rank, node, local, link, contact.timing).serve()


class _CoordinatorLink:
    """A rank's connection to the coordinator."""

    def __init__(self, channel: Channel, rank: int, timing: Timing, explain: bool) -> None:
        self.channel = channel
        self.received: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()
        self.comm: Communicator | None = None
        self.done = 0
        self._rank, self._beat_s, self._explain = rank, timing.beat_s, explain

    def listen(self) -> None:
        """Receives messages and sends heartbeats; ends the process when the coordinator says so or is gone."""
        beat = 0.0
        try:
            while True:
                message = self.channel.receive(self._beat_s)
                now = time.monotonic()
                if message is not None and message[0] == END:
                    code, why = pickle.loads(message[1])
                    _end(code, why if self._explain else "")
                if message is not None:
                    self.received.put(message)
                if now >= beat:
                    self.channel.try_send(BEAT, pickle.dumps(self._report(now)))  # a stopped coordinator reads nothing
                    beat = now + self._beat_s
        except (OSError, EOFError):
            _end(1, f"rank {self._rank}: the coordinator is gone" if self._explain else "")
        except BaseException:  # without this thread the process could not be ended
            _end(1, f"rank {self._rank}: {traceback.format_exc()}")

    def _report(self, now: float) -> Report:
        where = self.comm.where if self.comm else None
        if self.comm is None or where is None:
            return Report(self.done)
        came = tuple(self.comm.came.items())
        age_s = 0.0 if where.since is None else now - where.since
        return Report(self.done, came, (where.fingerprint, where.ranks), where.since is not None, age_s)


class _Rank:
    """The main thread of a rank: runs calls in order."""

    def __init__(self, rank: int, node: int, local: tuple[int, int], link: _CoordinatorLink, timing: Timing) -> None:
        self._rank, self._node, self._local, self._link, self._timing = rank, node, local, link, timing
        self._unpack = Unpacker()
        self._worker: Any = None
        self._number = 0  # of the next call
        self._joined_s = 0.0

    def serve(self) -> NoReturn:
        with torch.inference_mode():
            while True:
                kind, data = self._link.received.get()
                try:
                    if kind == SETUP:
                        self._set_up(pickle.loads(data))
                    elif kind == KEEP:
                        self._unpack.keep(data)
                    elif kind == CALL:
                        self._call(data)
                except BaseException as error:
                    self._failed(error)

    def _set_up(self, setup: Setup) -> None:
        local_rank, local_world_size = self._local
        if setup.device == "cpu":
            pin(local_rank, local_world_size, setup.num_threads)
        torch.set_num_threads(setup.num_threads)
        start = time.perf_counter()
        self._link.comm = connect_process(
            setup.mesh,
            self._rank,
            join_store(setup.store_address, setup.store_port, setup.prefix, self._timing.join_s),
            checked=setup.checked,
            device=rank_device(setup.device, local_rank),
            address=self._link.channel.address,
            node=self._node,
        )
        self._joined_s = time.perf_counter() - start

    def _call(self, data: bytes) -> None:
        method, args, kwargs, first_only = self._unpack(data)
        assert self._link.comm is not None, "a call came before the communicator was set up"
        self._link.comm.call = self._number + 1
        if method is None:
            (make,) = args
            start = time.perf_counter()
            self._worker = make(self._link.comm)
            result = Made(self._link.comm.transport, self._joined_s, time.perf_counter() - start)
        else:
            result = getattr(self._worker, method)(*args, **kwargs)
        number, wanted = self._number, self._rank == 0 or not first_only
        packed = pack((number, result)) if wanted else b""
        self._link.done = self._number = number + 1
        if wanted:
            self._link.channel.send(DONE, packed)

    def _failed(self, error: BaseException) -> None:
        """Reports the error, then waits: the coordinator ends all ranks now."""
        packed: bytes | None = None
        with contextlib.suppress(Exception):
            packed = pack(error)
            if type(pickle.loads(packed)) is not type(error):
                packed = None
        failure = Failure(
            call=self._number,
            error=packed,
            name=type(error).__name__,
            text=str(error),
            trace="".join(traceback.format_exception(error)),
            lost=self._collective() if isinstance(error, PeersLostError) else "",
        )
        with contextlib.suppress(OSError):
            self._link.channel.send(FAILED, pickle.dumps(failure))
        threading.Event().wait()

    def _collective(self) -> str:
        comm = self._link.comm
        return str(comm.where.fingerprint) if comm and comm.where else "the beginning"


def _end(code: int, why: str) -> NoReturn:
    """Ends this process now, also while its main thread is inside torch."""
    with contextlib.suppress(Exception):
        if why:
            print(f"narrows: {why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
