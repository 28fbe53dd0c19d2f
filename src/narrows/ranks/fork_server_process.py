"""The main program of a fork server: forks a rank per request, and reports the end of each."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from narrows.ranks.rank_process import boot

__all__ = ["LARGEST_MESSAGE", "PROGRAM", "TITLE", "serve_forks"]

PROGRAM = (
    "import json, sys; args = json.loads(sys.stdin.readline() or sys.exit(1)); sys.path[:] = args['path']; "
    "from narrows.imports import quick_imports\nwith quick_imports():\n"
    "  from narrows.ranks.fork_server_process import serve_forks\nserve_forks(args['link'])"
)
"""What ``python -c`` runs in a fork server that is a new interpreter."""

TITLE = "narrows forks"
LARGEST_MESSAGE = 1 << 16
_NUM_FDS = 3


def serve_forks(link_fd: int) -> NoReturn:
    """Forks a rank for each request, until the other end of the socket ``link_fd`` is closed.

    A request is a JSON object with the standard input, output and error of the rank. The answers are JSON lists:
    ``["forked", pid, 0]`` to a request, and ``["ended", pid, code]`` when a rank has ended.
    """
    # A terminal's Ctrl-C reaches every process of the group; the process that uses the ranks handles it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    _set_name(TITLE)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    gc.freeze()  # what is shared stays shared: a collection would write to it
    with socket.socket(fileno=link_fd) as link:
        while True:
            ready, _, _ = select.select([link.fileno(), woken], [], [])
            if woken in ready:
                os.read(woken, 1 << 10)
                _report_ended(link)
            if link.fileno() in ready:
                request, fds = _receive(link)
                _fork(link, request, fds, not_theirs=(woken, wake))


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds = b"", list[int]()
    # The other end has been reset if it ended with answers that it had not read.
    with contextlib.suppress(ConnectionResetError):
        data, fds, _, _ = socket.recv_fds(link, LARGEST_MESSAGE, _NUM_FDS)
    if not data:
        os._exit(0)  # the process that uses the ranks is gone
    return json.loads(data), fds


def _report_ended(link: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):  # there are none left
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _send(link, "ended", found[0], os.waitstatus_to_exitcode(found[1]))


def _send(link: socket.socket, kind: str, pid: int, code: int = 0) -> None:
    try:
        link.sendall(json.dumps([kind, pid, code]).encode())
    except OSError:
        os._exit(0)  # the process that uses the ranks is gone


def _fork(link: socket.socket, request: dict[str, Any], fds: list[int], not_theirs: tuple[int, ...]) -> None:
    for name in request["modules"]:
        with contextlib.suppress(Exception):  # the rank does the same, and reports the error
            import_module(name)
    if pid := os.fork():
        for fd in fds:
            os.close(fd)
        _send(link, "forked", pid)
        return
    try:
        link.close()
        for fd in not_theirs:
            os.close(fd)
        _be_a_rank(request, fds)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into the loop


def _be_a_rank(request: dict[str, Any], fds: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for standard, fd in zip(range(_NUM_FDS), fds, strict=True):
        if fd != standard:
            os.dup2(fd, standard)
            os.close(fd)
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    with contextlib.suppress(OSError):  # it has been removed
        os.chdir(request["folder"])
    with contextlib.suppress(OSError):  # they have been taken away
        os.sched_setaffinity(0, request["cores"])
    _set_name(request["name"])
    with open(0, "rb", closefd=False) as stdin:
        line = stdin.readline()
    if line:
        args = json.loads(line)
        sys.path[:] = args["path"]
        boot(args)


def _set_name(name: str) -> None:
    """What the system shows for this process beside its command line: up to 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="utf-8")
