"""What a rank process does: it obeys the host's calls, in order, and ends when the host says so or is gone.

Knows its channel to the host, its communicator and its worker; not what the worker does. The main thread works; another
thread listens to the host, and tells it twice a second that this rank lives and what it waits at. That thread ends the
process, whatever the main thread is in: a rank that waits in a collective cannot be woken in any other way.
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

from narrows.comm.device import rank_device
from narrows.comm.dist_communicator import DistCommunicator, connect
from narrows.comm.transport import PeersLostError
from narrows.ranks.channel import Channel
from narrows.ranks.cores import pin
from narrows.ranks.launch import Launch, find_host, join_store
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
    Setup,
    hello,
)
from narrows.ranks.packing import Unpacker, pack
from narrows.ranks.timing import Timing
from narrows.ranks.watch import Report

__all__ = ["PROGRAM", "boot", "obey", "run_rank"]

PROGRAM = (
    "import gc, json, sys; told = json.loads(sys.stdin.readline() or sys.exit(1)); sys.path[:] = told['path']; "
    "gc.disable(); from narrows.ranks.rank_process import boot; gc.enable(); gc.freeze(); boot(told)"
)
"""What ``python -c`` runs in a rank process. What it needs to know, and the key above all, comes through its stdin:
other users see a command line. The main module of the parent is not run again, so it needs no guard. The collector
looks at nothing of what is imported (torch): that would take a seventh of the start."""


def boot(told: dict[str, Any]) -> NoReturn:
    """The first and last call of a rank process that was started by its host or node."""
    # Ctrl-C reaches the whole terminal, and a service manager's SIGTERM all of a service; whoever started us ends us,
    # once, when what we run is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    contact = Contact(
        address=told["address"], port=told["port"], key=bytes.fromhex(told["key"]), timing=Timing(**told["timing"])
    )
    run_rank(contact, told["rank"], told["node"], tuple(told["place"]), explain=False)


def told_to(contact: Contact, rank: int, node: int, place: tuple[int, int]) -> str:
    """The line that :func:`boot` is told. ``place``: the rank's number on its host, and how many are there."""
    host: dict[str, Any] = {"address": contact.address, "port": contact.port, "key": contact.key.hex()}
    host["timing"] = asdict(contact.timing)
    return json.dumps(host | {"rank": rank, "node": node, "place": place, "path": sys.path}) + "\n"


def obey(launch: Launch) -> NoReturn:
    """Turns a process that torchrun started into its rank; it ends with the host's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_rank(find_host(launch), launch.ranks[0], launch.node, (launch.place, launch.places), explain=True)


def run_rank(contact: Contact, rank: int, node: int, place: tuple[int, int], *, explain: bool) -> NoReturn:
    """Runs a rank until the host ends it. ``explain``: say on stderr why it ends, if not well."""
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(rank, node, os.getpid())))
    except (OSError, EOFError) as error:
        _end(1, f"rank {rank} cannot reach its host at {contact.address} port {contact.port}: {error}")
    host = _Host(channel, rank, contact.timing, explain)
    threading.Thread(target=host.listen, name=f"narrows rank {rank} listens", daemon=True).start()
    _Rank(rank, place, host, contact.timing).serve()


class _Host:
    """The host, seen from a rank."""

    def __init__(self, channel: Channel, rank: int, timing: Timing, explain: bool) -> None:
        self.channel = channel
        self.told: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()
        self.comm: DistCommunicator | None = None
        self.done = 0
        self._rank, self._beat_s, self._explain = rank, timing.beat_s, explain

    def listen(self) -> None:
        """Takes messages in and beats; ends the process when the host says so or is gone."""
        beat = 0.0
        try:
            while True:
                message = self.channel.receive(self._beat_s)
                now = time.monotonic()
                if message is not None and message[0] == END:
                    code, why = pickle.loads(message[1])
                    _end(code, why if self._explain else "")
                if message is not None:
                    self.told.put(message)
                if now >= beat:
                    self.channel.try_send(BEAT, pickle.dumps(self._report(now)))  # a stopped host reads nothing
                    beat = now + self._beat_s
        except (OSError, EOFError):
            _end(1, f"rank {self._rank}: the host is gone" if self._explain else "")
        except BaseException:  # without this thread nobody could end the process
            _end(1, f"rank {self._rank}: {traceback.format_exc()}")

    def _report(self, now: float) -> Report:
        where = self.comm.where if self.comm else None
        if self.comm is None or where is None:
            return Report(self.done)
        came = tuple(self.comm.came.items())
        age_s = 0.0 if where.since is None else now - where.since
        return Report(self.done, came, (where.fingerprint, where.ranks), where.since is not None, age_s)


class _Rank:
    """The main thread: calls, in order."""

    def __init__(self, rank: int, place: tuple[int, int], host: _Host, timing: Timing) -> None:
        self._rank, self._place_on_host, self._host, self._timing = rank, place, host, timing
        self._unpack = Unpacker()
        self._worker: Any = None
        self._number = 0  # of the next call

    def serve(self) -> NoReturn:
        with torch.inference_mode():
            while True:
                kind, data = self._host.told.get()
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
        place, num_places = self._place_on_host
        if setup.device == "cpu":
            pin(place, num_places, setup.num_threads)
        torch.set_num_threads(setup.num_threads)
        self._host.comm = connect(
            setup.mesh,
            self._rank,
            join_store(setup.store_address, setup.store_port, setup.prefix, self._timing.join_s),
            checked=setup.checked,
            device=rank_device(setup.device, place),
            address=self._host.channel.address,
        )

    def _call(self, data: bytes) -> None:
        method, args, kwargs, first_only = self._unpack(data)
        assert self._host.comm is not None, "a call came before the communicator was set up"
        self._host.comm.call = self._number + 1
        if method is None:
            (make,) = args
            self._worker = make(self._host.comm)
            result = self._host.comm.transport
        else:
            result = getattr(self._worker, method)(*args, **kwargs)
        number, wanted = self._number, self._rank == 0 or not first_only
        said = pack((number, result)) if wanted else b""
        self._host.done = self._number = number + 1
        if wanted:
            self._host.channel.send(DONE, said)

    def _failed(self, error: BaseException) -> None:
        """Says what was raised, and waits for the end: the host ends all ranks then."""
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
            lost=self._place() if isinstance(error, PeersLostError) else "",
        )
        with contextlib.suppress(OSError):
            self._host.channel.send(FAILED, pickle.dumps(failure))
        threading.Event().wait()

    def _place(self) -> str:
        comm = self._host.comm
        return str(comm.where.fingerprint) if comm and comm.where else "the beginning"


def _end(code: int, why: str) -> NoReturn:
    """Ends this process now, also while its main thread is inside torch."""
    with contextlib.suppress(Exception):
        if why:
            print(f"narrows: {why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
