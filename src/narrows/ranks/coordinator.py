"""The ranks of one world as the process sees them that hands out calls: connected, heard, judged, and ended.

Knows channels, processes and clocks; not what calls do. Who is late or waits in vain is judged by `watch.py`; here are
the ranks that raise, die or fall silent. The first failure counts: it fails the calls, and then all ranks end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from narrows.comm.fingerprint import rank_names
from narrows.errors import ConfigError, NarrowsError, RankError
from narrows.layout import Mesh
from narrows.ranks.channel import Channel, listen
from narrows.ranks.launch import Launch, coordinator_key, open_store, publish
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
    Hello,
    Setup,
    hello,
)
from narrows.ranks.packing import Packer, pack
from narrows.ranks.spawn import Processes, end_processes, ending, spawn
from narrows.ranks.timing import TIMING, Timing
from narrows.ranks.watchdog import Watchdog

__all__ = ["Coordinator"]


class _Peer:
    """A rank, or a node, that has connected."""

    def __init__(self, channel: Channel, said: Hello, now: float) -> None:
        self.channel, self.said = channel, said
        self.heard = now
        self.gone = threading.Event()

    def __str__(self) -> str:
        what = f"node {self.said.node}" if self.said.rank is None else f"rank {self.said.rank}"
        return f"{what} (pid {self.said.pid} on {self.said.host})"


class _Call:
    """Something every rank does once."""

    def __init__(self, num_results: int) -> None:
        self.results: list[Any] = [None] * num_results
        self.missing = num_results
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()  # a rank cannot skip what the others do: no cancelling


class Coordinator:
    """Starts the ranks of a mesh, hands them calls, and ends them. One thread listens per peer, one watches the clock.

    ``timing``: what ranks are judged by, in seconds of ``clock``.
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
        self.mesh = mesh
        self.forgotten = False
        self._launch, self._timing, self._clock = launch, timing, clock
        self._packer = Packer(once)
        self._watchdog = Watchdog(mesh.size, timeout_s, timing.stuck_s)
        self._tick_s = min(timing.beat_s / 2, timeout_s / 4)
        self._ticked_at = clock()
        self._lock = threading.Lock()  # of what follows; never held while something is sent
        self._pending: dict[int, _Call] = {}
        self._num_calls = 0
        self._failure: BaseException | None = None
        self._failed_at = 0.0
        self._suspicion: tuple[float, RankError] | None = None
        self._lost: list[str] = []
        self._told = threading.Condition(self._lock)  # another one has lost its peers
        self._ordering = threading.Lock()  # keeps calls in one order on all ranks
        self._peers: list[_Peer] = []
        self._ranks: dict[int, _Peer] = {}
        self._processes: Processes = {}
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._checked = False

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._ranks[rank].said.pid for rank in range(self.mesh.size))

    @property
    def failure(self) -> BaseException | None:
        """What has ended the ranks, or is about to; None while all is well."""
        return self._failure

    def silence_s(self) -> tuple[float, ...]:
        """For how long nothing has been heard of each rank, in seconds; a rank that lives beats every ``beat_s``.

        As of the last tick: while this process stood still, it could hear no rank.
        """
        return tuple(max(self._ticked_at - self._ranks[rank].heard, 0.0) for rank in range(self.mesh.size))

    # --- the beginning

    def start(self, *, checked: bool, num_threads: int, device: str) -> None:
        """Starts this host's ranks, waits for all, and tells them how to meet."""
        launch, self._checked = self._launch, checked
        self._store, store_address, store_port = open_store(launch, self._timing.join_s)
        with listen(launch.address if launch else "127.0.0.1") as listener:
            address = launch.address if launch else "127.0.0.1"
            contact = Contact(
                address=address, port=listener.getsockname()[1], key=coordinator_key(), timing=self._timing
            )
            if launch is not None:
                publish(launch, self._store, contact)
            self._start_thread(self._tick, "narrows watches its ranks")
            own = launch.ranks if launch else tuple(range(self.mesh.size))
            spawn(own, 0, contact, self._processes)
            nodes = launch.num_nodes - 1 if launch and not launch.by_torchrun else 0
            self._welcome(listener, contact.key, self.mesh.size + nodes)
        setup = Setup(
            mesh=self.mesh,
            checked=checked,
            num_threads=num_threads,
            device=device,
            store_address=store_address,
            store_port=store_port,
            prefix=f"narrows world {secrets.token_hex(4)}",
        )
        for rank in range(self.mesh.size):
            with contextlib.suppress(OSError):
                self._ranks[rank].channel.send(SETUP, pickle.dumps(setup))

    def _welcome(self, listener: Any, key: bytes, num_peers: int) -> None:
        """Accepts every rank and node, in any order."""
        listener.settimeout(0.1)
        end = self._clock() + self._timing.join_s
        while len(self._peers) < num_peers:
            if self._failure is not None:
                raise self._failure
            for rank, child in self._processes.items():
                if child.poll() is not None and rank not in self._ranks:
                    raise RankError(f"rank {rank} (pid {child.pid}) {ending(child)} before it had started")
            if self._clock() > end:
                missing = [rank for rank in range(self.mesh.size) if rank not in self._ranks]
                raise RankError(f"{rank_names(missing)} did not start within {self._timing.join_s:g} s")
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            with contextlib.suppress(OSError, EOFError):  # a stranger, or one that is gone again
                channel = Channel.accept(sock, key, self._timing.silence_s)
                self._admit(channel)

    def _admit(self, channel: Channel) -> None:
        message = channel.receive(self._timing.silence_s)
        if message is None or message[0] != HELLO:
            channel.close()
            return
        peer = _Peer(channel, pickle.loads(message[1]), self._clock())
        own = hello(None, 0, os.getpid()).versions
        if peer.said.versions != own:
            raise ConfigError(
                f"{peer} runs {peer.said.versions}, but its coordinator runs {own}: they must be the same"
            )
        self._peers.append(peer)
        if peer.said.rank is not None:
            self._ranks[peer.said.rank] = peer
        self._start_thread(lambda: self._hear(peer), f"narrows hears {peer}")

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
            call = _Call(1 if first_only else self.mesh.size)
            with self._lock:
                refused = self._failure
                if refused is None and self._over.is_set():
                    refused = RankError(f"{method} was called on closed ranks")
            if refused is not None:
                call.future.set_exception(refused)
                return call.future
            data = pack((method, args, kwargs, first_only), self._packer)
            messages = [(KEEP, kept) for kept in self._packer.take_new()] + [(CALL, data)]
            with self._lock:
                self._pending[self._num_calls] = call
                self._num_calls += 1
            for rank in range(self.mesh.size):
                with contextlib.suppress(OSError):  # whoever hears that rank knows already
                    for kind, what in messages:
                        self._ranks[rank].channel.send(kind, what)
            if self._over.is_set():
                self._drop_pending()  # the end came in between
        return call.future

    def _done(self, rank: int, number: int, result: Any) -> None:
        with self._lock:
            call = self._pending.get(number)
            if call is None:
                return
            call.results[rank] = result
            call.missing -= 1
            if call.missing:
                return
            del self._pending[number]
        call.future.set_result(call.results)

    # --- failures

    def fail(self, error: BaseException, number: int = 0) -> None:
        """Fails call ``number`` and those after it; only the first failure counts. The ranks end soon after."""
        with self._lock:
            if self._failure is not None or self._over.is_set():
                return
            self._failure, self._failed_at = error, self._clock()
            undone = [self._pending.pop(i) for i in sorted(self._pending) if i >= number]
        for call in undone:
            call.future.set_exception(error)

    def _drop_pending(self) -> None:
        with self._lock:
            undone, self._pending = list(self._pending.values()), {}
            error = self._failure or RankError("the ranks were closed before they had done all calls")
        for call in undone:
            call.future.set_exception(error)

    def _failed(self, peer: _Peer, failure: Failure) -> None:
        """A rank has raised; or a node says that a rank has ended."""
        if failure.lost:
            with self._lock:
                self._lost.append(f"{peer} was at {failure.lost}")
                self._told.notify_all()
                text = f"{peer} lost its peers at {failure.lost}: {failure.text}"
                self._suspicion = self._suspicion or (self._clock(), RankError(text))
            return
        if peer.said.rank is None:
            self.fail(RankError(failure.text))
            return
        error: BaseException | None = None
        if failure.error is not None:
            with contextlib.suppress(Exception):
                error = pickle.loads(failure.error)
        if error is None:
            error = RankError(f"{peer} failed: {failure.name}: {failure.text}")
        error.add_note(f"The first error on {self.mesh}: it was raised on {peer}.")
        error.add_note(failure.trace)
        self.fail(error, failure.call)

    def _gone(self, peer: _Peer) -> None:
        """A connection has ended. Why is known of a child."""
        if self._over.is_set():
            return
        why = "is gone: its connection was closed"
        child = self._processes.get(peer.said.rank) if peer.said.rank is not None else None
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(self._timing.exit_s)
                why = ending(child)
                if child.returncode == -signal.SIGABRT and not self._checked:
                    why += "; if collectives did not match, checked mode names them"
        with self._told:
            if self._pending and self._failure is None:
                self._told.wait_for(
                    lambda: len(self._lost) >= self.mesh.size - 1 or self._over.is_set(), self._timing.tell_s
                )
            told = "; ".join([why, *self._lost])
        self.fail(RankError(f"{peer} {told}"))

    # --- what the threads do

    def _hear(self, peer: _Peer) -> None:
        rank = peer.said.rank
        try:
            while True:
                message = peer.channel.receive(self._timing.silence_s)
                if message is None:
                    continue
                peer.heard = self._clock()
                kind, data = message
                if kind == DONE and rank is not None:
                    self._done(rank, *pickle.loads(data))
                elif kind == FAILED:
                    self._failed(peer, pickle.loads(data))
                elif kind == BEAT and rank is not None:
                    with self._lock:
                        self._watchdog.hear(rank, pickle.loads(data), peer.heard)
        except EOFError:
            self._gone(peer)
        except BaseException as error:  # e.g. a result of a class that this process lacks
            self.fail(error)
        finally:
            peer.gone.set()

    def _tick(self) -> None:
        """Judges which ranks are gone; after a failure, ends the ranks."""
        while not self._over.wait(self._tick_s):
            now = self._clock()
            if now - self._ticked_at > self._timing.suspended_s:
                for peer in self._peers:
                    peer.heard = now
            self._ticked_at = now
            if self.forgotten:
                self.end(None)
                return
            if self._failure is not None:
                if not self._pending or now - self._failed_at > self._timing.grace_s:
                    self.end(None)
                    return
                continue
            self._judge(now)

    def _judge(self, now: float) -> None:
        if any(now - peer.heard > self._timing.silence_s for peer in list(self._peers)):
            self.fail(RankError(self._told_of_the_silent(now)))
            return
        with self._lock:
            suspicion = self._suspicion
            verdict = self._watchdog.verdict(self._num_calls, now) if self._pending else None
        if suspicion is not None and now - suspicion[0] > self._timing.blame_s:
            self.fail(suspicion[1])
        elif verdict is not None and suspicion is None:
            ranks, why = verdict
            self.fail(RankError(f"{rank_names(ranks)} {why}"))

    def _told_of_the_silent(self, now: float) -> str:
        """Everyone who is silent: if a host has vanished, those are all its ranks."""
        timing = self._timing
        silent = [peer for peer in list(self._peers) if now - peer.heard > timing.silence_s - timing.suspended_s]
        silent.sort(key=lambda peer: (peer.said.rank is None, peer.said.rank))
        names = ", ".join(f"{peer}{self._state(peer)}" for peer in silent)
        told = f"{names}: nothing was heard for {timing.silence_s:g} s"
        with self._lock:
            waiting = self._watchdog.waiting_for([peer.said.rank for peer in silent if peer.said.rank is not None])
        return f"{told}; {waiting}" if waiting else told

    def _state(self, peer: _Peer) -> str:
        """What this host's kernel says of a silent child; nothing elsewhere."""
        if peer.said.rank not in self._processes:
            return ""
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{peer.said.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return " is stopped" if state in "Tt" else " lives, but does not answer"
        return ""

    # --- the end

    def end(self, error: BaseException | None) -> None:
        """Ends all ranks, once. ``error``: why, if something failed; their exit code tells."""
        with self._ending:
            if self._over.is_set():
                return
            self._over.set()
            with self._told:
                self._told.notify_all()
            error = self._failure or error
            code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
            code = 2 if isinstance(error, NarrowsError) else code
            why = " ".join(str(error).split()) or type(error).__name__ if error is not None else ""
            self._drop_pending()
            for peer in self._peers:
                peer.channel.try_send(END, pickle.dumps((code, why)))
            end_processes(self._processes, self._timing.grace_s)
            end = time.monotonic() + self._timing.grace_s
            for peer in self._peers:
                peer.gone.wait(max(0.0, end - time.monotonic()))
                peer.channel.shut()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(self._timing.grace_s)
            for peer in self._peers:
                peer.channel.close()
            self._store = None
