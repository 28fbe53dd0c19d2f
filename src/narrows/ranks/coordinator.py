"""Starts the ranks of a mesh, hands them calls in order, listens to them, and ends them.

The first failure counts: it fails the calls, and then all ranks end.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from narrows.comm.fingerprint import rank_names
from narrows.errors import NarrowsError, RankError
from narrows.layout import Mesh
from narrows.ranks.channel import listen
from narrows.ranks.failure_detector import FailureDetector
from narrows.ranks.launch import Launch, coordinator_key, open_store, publish
from narrows.ranks.messages import BEAT, CALL, DONE, END, FAILED, KEEP, SETUP, Contact, Failure, Setup
from narrows.ranks.packing import Packer, pack
from narrows.ranks.peers import Peer, Peers
from narrows.ranks.pending import PendingCalls
from narrows.ranks.spawn import Doors, Processes, end_processes, ending, send_contact, start
from narrows.ranks.timing import TIMING, Timing

__all__ = ["Coordinator"]


class Coordinator:
    """One thread listens to each peer, one watches the clock.

    ``timing``: the durations that `failure_detector.py` judges by, in seconds of ``clock``.
    """

    def __init__(
        self,
        mesh: Mesh,
        timeout_s: float,
        launch: Launch | None,
        once: tuple[type, ...],
        timing: Timing = TIMING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.forgotten = False
        """Set when the owner of the ranks has dropped them without closing."""
        self._mesh, self._launch, self._timing, self._clock = mesh, launch, timing, clock
        self._tick_s = min(timing.beat_s / 2, timeout_s / 4)
        self._packer = Packer(once)
        self._peers = Peers(mesh.size)
        self._processes: Processes = {}
        self._doors: Doors = {}
        self._detector = FailureDetector(self._peers, self._processes, timing, mesh.size, timeout_s, clock())
        self._pending = PendingCalls()
        self._ordering = threading.Lock()  # keeps calls in one order on all ranks
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._checked = False

    @property
    def pids(self) -> tuple[int, ...]:
        """The process id of each rank, on its host."""
        return self._peers.pids

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, or is about to; None while all is well."""
        return self._pending.failure

    def silence_s(self) -> tuple[float, ...]:
        """Seconds since each rank was last heard; below ``beat_s`` or a little more while it lives.

        As of the last tick: while this process was suspended, it could hear no rank.
        """
        return self._peers.silence_s(self._detector.judged_at)

    # --- the start

    def start(
        self,
        *,
        checked: bool,
        num_threads: int,
        device: str,
        fork_self: bool,
        modules: Sequence[str],
        meanwhile: Callable[[], None],
    ) -> None:
        """Starts this host's ranks, waits until all have connected, and sends them their setup.

        ``fork_self``: ranks may come from a fork of this process, if it has a single thread, so this comes first.
        ``modules``: what the ranks will import. ``meanwhile``: called when the processes are there; from then on this
        one may start threads.
        """
        launch, self._checked = self._launch, checked
        own = launch.ranks if launch else tuple(range(self._mesh.size))
        self._doors = start(own, self._processes, forked=device == "cpu", fork_self=fork_self, modules=modules)
        meanwhile()
        self._store, store_address, store_port = open_store(launch, self._timing.join_s)
        address = launch.address if launch else "127.0.0.1"
        with listen(address) as listener:
            port = listener.getsockname()[1]
            contact = Contact(address=address, port=port, key=coordinator_key(), timing=self._timing)
            if launch is not None:
                publish(launch, self._store, contact)
            self._start_thread(self._tick, "narrows watches its ranks")
            send_contact(self._doors, 0, contact)
            nodes = launch.num_nodes - 1 if launch and not launch.by_torchrun else 0
            self._accept_all(listener, contact.key, self._mesh.size + nodes)
        setup = Setup(
            mesh=self._mesh,
            checked=checked,
            num_threads=num_threads,
            device=device,
            store_address=store_address,
            store_port=store_port,
            prefix=f"narrows world {secrets.token_hex(4)}",
        )
        for peer in self._peers.ranks.values():
            with contextlib.suppress(OSError):  # it has ended: its listener reports that
                peer.channel.send(SETUP, pickle.dumps(setup))

    def _accept_all(self, listener: Any, key: bytes, num_peers: int) -> None:
        """Accepts every rank and node, in any order."""
        listener.settimeout(0.1)
        end = self._clock() + self._timing.join_s
        while len(self._peers.all) < num_peers:
            if self.failure is not None:
                raise self.failure
            for rank, process in self._processes.items():
                if process.poll() is not None and rank not in self._peers.ranks:
                    raise RankError(f"rank {rank} (pid {process.pid}) {ending(process)} before it had started")
            if self._clock() > end:
                names = rank_names(self._peers.missing)
                raise RankError(f"{names} did not start within {self._timing.join_s:g} s")
            peer = self._peers.accept(listener, key, self._timing.silence_s, self._clock())
            if peer is not None:
                self._start_thread(partial(self._listen, peer), f"narrows listens to {peer}")

    def _start_thread(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- calls

    def call(
        self, method: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, first_only: bool = False
    ) -> Future[list[Any]]:
        """Hands a call to every rank. After a failure, or after the end, the future fails at once.

        ``first_only``: rank 0 alone sends its result; errors come from all.
        """
        with self._ordering:
            if (refusal := self._pending.refusal(method)) is not None:
                refused: Future[list[Any]] = Future()
                refused.set_exception(refusal)
                return refused
            data = pack((method, args, kwargs, first_only), self._packer)
            messages = [(KEEP, kept) for kept in self._packer.take_new()] + [(CALL, data)]
            future = self._pending.add(1 if first_only else self._mesh.size)
            for rank in range(self._mesh.size):
                with contextlib.suppress(OSError):  # it has ended: its listener reports that
                    for kind, content in messages:
                        self._peers.ranks[rank].channel.send(kind, content)
            if self._over.is_set():
                self._pending.close()  # the end came in between
        return future

    # --- what the threads do

    def _listen(self, peer: Peer) -> None:
        try:
            while True:
                message = peer.channel.receive(self._timing.silence_s)
                if message is None:
                    continue
                peer.heard = self._clock()
                kind, data = message
                if kind == DONE and peer.rank is not None:
                    self._pending.done(peer.rank, *pickle.loads(data))
                elif kind == FAILED:
                    self._rank_failed(peer, pickle.loads(data))
                elif kind == BEAT and peer.rank is not None:
                    self._detector.heartbeat(peer.rank, pickle.loads(data), peer.heard)
        except EOFError:
            if not self._over.is_set():
                at_work = bool(self._pending) and self.failure is None
                error = self._detector.death(peer, at_work=at_work, checked=self._checked)
                self._pending.fail(error, 0, self._clock())
        except BaseException as error:  # for example a result of a class that this process lacks
            self._pending.fail(error, 0, self._clock())
        finally:
            peer.gone.set()

    def _rank_failed(self, peer: Peer, failure: Failure) -> None:
        """A call raised on a rank, or a node reports that a rank has ended."""
        if failure.lost:
            self._detector.peer_lost(peer, failure, self._clock())
            return
        if peer.rank is None:
            self._pending.fail(RankError(failure.text), 0, self._clock())
            return
        error: BaseException | None = None
        if failure.error is not None:
            with contextlib.suppress(Exception):
                error = pickle.loads(failure.error)
        if error is None:
            error = RankError(f"{peer} failed: {failure.name}: {failure.text}")
        error.add_note(f"The first error on {self._mesh}: it was raised on {peer}.")
        error.add_note(failure.trace)
        self._pending.fail(error, failure.call, self._clock())

    def _tick(self) -> None:
        """Judges the ranks at each tick; after a failure, ends them."""
        while not self._over.wait(self._tick_s):
            now = self._clock()
            if self.forgotten:
                self.end(None)
                return
            if self.failure is not None:
                if not self._pending or now - self._pending.failed_at > self._timing.grace_s:
                    self.end(None)
                    return
                continue
            error = self._detector.judge(self._pending.num_calls if self._pending else None, now)
            if error is not None:
                self._pending.fail(error, 0, now)

    # --- the end

    def end(self, error: BaseException | None) -> None:
        """Ends all ranks, once. ``error``: why, if something failed; the ranks' exit code says so too."""
        with self._ending:
            if self._over.is_set():
                return
            self._over.set()
            self._detector.close()
            error = self.failure or error
            code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
            code = 2 if isinstance(error, NarrowsError) else code
            why = " ".join(str(error).split()) or type(error).__name__ if error is not None else ""
            self._pending.close()
            for peer in self._peers.all:
                peer.channel.try_send(END, pickle.dumps((code, why)))
            for door in self._doors.values():
                with contextlib.suppress(OSError):
                    door.close()
            end_processes(self._processes, self._timing.grace_s)
            end = time.monotonic() + self._timing.grace_s
            for peer in self._peers.all:
                peer.gone.wait(max(0.0, end - time.monotonic()))
                peer.channel.shut()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(self._timing.grace_s)
            for peer in self._peers.all:
                peer.channel.close()
            self._store = None
