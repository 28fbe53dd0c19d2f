"""A process that forks ranks: it imports torch once, and then a rank is there in milliseconds, again and again.

A fork has only the thread that asked for it. Whatever other threads held (locks, the teams of OpenMP) would stay as it
was for good. So ranks are forks of a process that has a single thread and does nothing else. It begins as a fork of
this process where that has a single thread, else as a new interpreter, and ends when this process does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from narrows.errors import RankError
from narrows.ranks.fork_server_process import LARGEST_MESSAGE, PROGRAM, TITLE, serve_forks

__all__ = ["UNKNOWN_CODE", "ForkServer", "ForkedRank", "fork_server", "has_one_thread", "signals_blocked"]

UNKNOWN_CODE = 256
"""The exit code of a rank that ended after its fork server, which alone could know the real one."""

_READ_ONCE = (
    *("ATEN_", "DNNL_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NARROWS_", "OMP_", "ONEDNN_", "OPENBLAS_"),
    *("PYTHON", "TORCH"),
)
"""Libraries read such environment variables once. After a change of one, ranks come from another fork server."""

_ANSWERS_S = 120.0
"""A fork server that has not answered for so long is stopped. It may have to import torch from a slow disk."""
_GRACE_S = 1.0
_NAP_S = 0.002


class ForkedRank:
    """A rank process that a fork server has made, with the part of ``subprocess.Popen`` that its owner needs."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server, self._pidfd = server, os.pidfd_open(pid)
        self._asking = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, a signal's number negated, or None while it lives."""
        with self._asking:
            if self.returncode is None:
                self.returncode = self._server.exit_code(self.pid, self._pidfd)
                if self.returncode is not None:
                    os.close(self._pidfd)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(min(left, _NAP_S))
        return code

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class ForkServer:
    """A fork server, as the process that uses it sees it.

    Args:
        fork_self: it is a fork of this process, which has a single thread, and keeps its modules; else it is a new
            interpreter.
    """

    def __init__(self, *, fork_self: bool) -> None:
        self._owner = os.getpid()
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        self._living: set[int] = set()
        self._codes: dict[int, int] = {}
        self._is_gone = False
        self._interpreter: subprocess.Popen[bytes] | None = None
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(_ANSWERS_S)
        with theirs, signals_blocked():
            self.pid = self._fork_self(theirs) if fork_self else self._start_interpreter(theirs)

    def fits(self) -> bool:
        """Whether it can make ranks that are what new interpreters would be here and now."""
        with self._lock:
            self._receive_all()
        mine = self._owner == os.getpid() and not self._is_gone
        return mine and _read_once(self._environment) == _read_once(os.environ)

    @property
    def has_ranks(self) -> bool:
        """Whether ranks that it has made live."""
        with self._lock:
            self._receive_all()
            return bool(self._living)

    def fork(self, names: Sequence[str], modules: Sequence[str] = ()) -> list[tuple[ForkedRank, IO[bytes]]]:
        """Forks a rank for each name. Each reads the line of :func:`~narrows.ranks.rank_process.boot_line` that this
        process writes to the file beside it, and runs it; without a line it ends.

        The name is what the system shows for the process beside its command line. The environment, the folder, the
        cores, and the standard output and error are those of this process now.

        Args:
            modules: what the ranks will import; the fork server imports it once.

        Raises:
            RankError: the fork server is gone, or does not answer.
        """
        request = {"modules": list(modules), **self._surroundings()}
        made: list[ForkedRank] = []
        doors: list[IO[bytes]] = []
        try:
            for name in names:
                reads, writes = os.pipe()
                doors.append(os.fdopen(writes, "wb"))
                try:
                    made.append(self._fork_one(json.dumps(request | {"name": name}).encode(), reads))
                finally:
                    os.close(reads)
        except (OSError, EOFError) as error:
            for door in doors:
                door.close()  # the ranks of the others end
            self._is_gone = True
            raise RankError(f"the process that forks ranks (pid {self.pid}) does not answer: {error}") from None
        return list(zip(made, doors, strict=True))

    def exit_code(self, pid: int, pidfd: int) -> int | None:
        """The exit code of one of its ranks; None while that lives, and for the moment until it is known."""
        with self._lock:
            self._receive_all()
            if pid in self._codes:
                return self._codes.pop(pid)
            return UNKNOWN_CODE if self._is_gone and select.select([pidfd], [], [], 0.0)[0] else None

    def close(self) -> None:
        """Ends the fork server, and waits until it has ended. Ranks live on, but their exit codes are lost."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._is_gone = True
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)
            self._link.close()
        end = time.monotonic() + _GRACE_S
        while not self._has_ended():
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            time.sleep(_NAP_S)

    def _fork_self(self, theirs: socket.socket) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # what is shared stays shared: a collection would write to it
        if pid := os.fork():
            return pid
        try:
            self._link.close()
            signal.set_wakeup_fd(-1)
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)  # and not the user's terminal
            serve_forks(theirs.detach())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # never back into what the forked process was doing

    def _start_interpreter(self, theirs: socket.socket) -> int:
        command, link = [sys.executable, "-P", "-c", PROGRAM, TITLE], theirs.fileno()
        self._interpreter = new = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(link,))
        assert new.stdin is not None
        with contextlib.suppress(BrokenPipeError), new.stdin:
            new.stdin.write(json.dumps({"path": sys.path, "link": link}).encode() + b"\n")
        return new.pid

    def _has_ended(self) -> bool:
        if self._interpreter is not None:
            return self._interpreter.poll() is not None
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        return True

    def _fork_one(self, request: bytes, reads: int) -> ForkedRank:
        with self._lock, open(os.devnull, "wb") as nothing:
            outputs = [fd if _is_open(fd) else nothing.fileno() for fd in (1, 2)]
            socket.send_fds(self._link, [request], [reads, *outputs])
            while (pid := self._receive()) is None:
                pass
            self._living.add(pid)
        return ForkedRank(self, pid)

    def _receive_all(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while not self._is_gone and select.select([self._link], [], [], 0.0)[0]:
                self._receive()

    def _receive(self) -> int | None:
        """Reads one message: the process id of a new rank, or None after noting that a rank has ended."""
        message = b""
        with contextlib.suppress(ConnectionResetError):  # it ended with requests that it had not read
            message = self._link.recv(LARGEST_MESSAGE)
        if not message:
            self._is_gone = True
            raise EOFError("it has ended")
        kind, pid, code = json.loads(message)
        if kind == "forked":
            return int(pid)
        self._codes[pid] = code
        self._living.discard(pid)
        return None

    def _surroundings(self) -> dict[str, Any]:
        now, then = os.environ, self._environment
        changed: dict[str, str | None] = {name: value for name, value in now.items() if then.get(name) != value}
        changed |= dict.fromkeys(then.keys() - now.keys())
        folder = ""
        with contextlib.suppress(OSError):  # it has been removed
            folder = os.getcwd()
        return {"environment": changed, "folder": folder, "cores": sorted(os.sched_getaffinity(0))}


class _Current:
    """The fork servers of this process: the first is made when ranks need one, another after a change that it lacks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: list[ForkServer] = []

    def get(self, *, fork_self: bool) -> ForkServer:
        with self._lock:
            fitting = next((server for server in self._servers if server.fits()), None)
            if fitting is None:
                self._servers = [server for server in self._servers if not self._closed(server)]
                fitting = ForkServer(fork_self=fork_self and has_one_thread())
                self._servers.append(fitting)
            return fitting

    def close(self) -> None:
        with self._lock:
            for server in self._servers:
                server.close()
            self._servers.clear()

    @staticmethod
    def _closed(server: ForkServer) -> bool:
        if server.has_ranks:
            return False
        server.close()
        return True


_current = _Current()
atexit.register(_current.close)  # as early as this, so that it comes after the end of all ranks


def fork_server(*, fork_self: bool = False) -> ForkServer | None:
    """The fork server of this process; None on a system without pidfd (Linux has had it since 5.3).

    ``fork_self``: if there is none yet, it may be a fork of this process.
    """
    return _current.get(fork_self=fork_self) if _has_pidfd() else None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, here and in new processes until they ignore them: both may be sent to a whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def has_one_thread() -> bool:
    """Whether this process has a single thread, as the system counts them."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _has_pidfd() -> bool:
    """Whether the system has it, and this process may use it: some containers refuse calls that they do not know."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_ONCE)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
