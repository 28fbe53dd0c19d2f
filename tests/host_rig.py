"""Several hosts on one machine: network namespaces, joined by a cable of chosen rate and delay. Linux, as root.

``tc`` shapes the rate (a token bucket at each end). The delay is the cable's: a process of its own, between a TUN
device of each end, which hands on every packet a fixed time after it came. So no kernel module for delays is needed.
Nothing outside the namespaces is touched, and all of it ends with :class:`HostRig`.

    with HostRig(rate_mbit=1000, delay_s=2e-4) as rig:
        subprocess.Popen([*rig.on(0), "python", ...])
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from types import TracebackType

__all__ = ["HostRig", "why_none"]

_TUN, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0001, 0x1000
_PR_SET_TIMERSLACK, _PR_SET_PDEATHSIG = 29, 1
_MTU = 60_000
"""Bytes of a packet: with 1500 the cable's process would be the narrowest part."""
_MORE = 1000
"""Bytes beyond a packet that may pass at once after a pause."""
_QUEUED_MS = 100
"""What may wait at an end of the cable; TCP takes what does not fit as a full line."""


def why_none() -> str:
    """Why there can be no rig here; empty if there can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"two hosts are made of network namespaces, which need iproute2 (`{program}`)"
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces are made by root, on Linux"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"there is no {_TUN}"
    return ""


class NoRigError(Exception):
    """The kernel refuses a part of the rig; the text is its own."""


class HostRig:
    """Two hosts and their cable, from ``__enter__`` to ``__exit__``.

    Args:
        rate_mbit: of each direction.
        delay_s: of each direction, on top of what the machine itself takes.
        mtu: bytes of a packet. Below some Mb/s a large one would pass at once.
        cores: of each host; empty: it may use all of the machine.

    Raises:
        NoRigError: on entry.
    """

    addresses = ("10.99.0.1", "10.99.0.2")

    def __init__(
        self,
        *,
        rate_mbit: float = 1000.0,
        delay_s: float = 2e-4,
        mtu: int = _MTU,
        cores: tuple[tuple[int, ...], ...] = ((), ()),
    ) -> None:
        self.names = tuple(f"narrows-{os.getpid()}-{letter}" for letter in "ab")
        self._devices = tuple(f"nw{os.getpid()}{letter}" for letter in "ab")
        self._rate, self._delay_s, self._mtu, self._cores = rate_mbit, delay_s, mtu, cores
        self._made: list[str] = []
        self._cable: subprocess.Popen[bytes] | None = None

    def on(self, host: int) -> list[str]:
        """What comes before a command to run it on a host."""
        pinned = ["taskset", "-c", ",".join(map(str, self._cores[host]))] if self._cores[host] else []
        return ["ip", "netns", "exec", self.names[host], *pinned]

    def __enter__(self) -> HostRig:
        try:
            self._make()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def cut(self) -> None:
        """From now on every packet is lost, both ways, without a word to either end: a cut cable, a dead host."""
        assert self._cable is not None
        self._cable.send_signal(signal.SIGUSR1)

    def set_rate(self, rate_mbit: float) -> None:
        """Make the cable faster or slower."""
        self._rate = rate_mbit
        for name, device in zip(self.names, self._devices, strict=True):
            self._shape("change", name, device)

    def _make(self) -> None:
        _remove_left()
        for name in self.names:
            _run("ip", "netns", "add", name)
            self._made.append(name)
        command = [sys.executable, __file__, *self._devices, str(self._delay_s)]
        self._cable = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._cable.stdout is not None
        if not self._cable.stdout.readline():
            raise NoRigError(f"{_TUN} gives no device")
        for name, device, address in zip(self.names, self._devices, self.addresses, strict=True):
            _run("ip", "link", "set", device, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", name, "link", "set", device, "mtu", str(self._mtu))
            self._shape("add", name, device)
            for each in ("lo", device):
                _run("ip", "-n", name, "link", "set", each, "up")

    def _shape(self, verb: str, name: str, device: str) -> None:
        burst = self._mtu + _MORE
        queued = max(2 * burst, round(self._rate * 1e3 / 8 * _QUEUED_MS))
        bucket = f"tbf rate {round(self._rate * 1000)}kbit burst {burst} limit {queued}"
        _run("tc", "-n", name, "qdisc", verb, "dev", device, "root", *bucket.split())

    def _end(self) -> None:
        if self._cable is not None:
            self._cable.kill()
            self._cable.communicate()
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=True)
        self._made.clear()


def _remove_left() -> None:
    """Namespaces of processes that were killed in the middle."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(r"^(narrows-(\d+)-[ab])\b", listed, re.MULTILINE):
        if not os.path.exists(f"/proc/{pid}"):
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoRigError(f"{' '.join(command)}: {done.stderr.strip()}")


# --- the cable, in a process of its own


def _cable(devices: list[str], delay_s: float) -> None:
    """Hands packets from each device to the other, ``delay_s`` after they came; SIGUSR1: no more."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_TIMERSLACK, 1)  # else a wait is 50 us longer than it says
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # no rank keeps a packet waiting
    is_cut = False

    def cut(*_: object) -> None:
        nonlocal is_cut
        is_cut = True

    signal.signal(signal.SIGUSR1, cut)
    ends = []
    for name in devices:
        end = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        ends.append(end)
    print(flush=True)
    other = dict(zip(ends, reversed(ends), strict=True))
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select(ends, [], [], wait)
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, _MTU + 64)
            if not is_cut:
                under_way.append((now + delay_s, other[end], packet))
        while under_way and under_way[0][0] <= now:
            _, end, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # the other end is down
                os.write(end, packet)


if __name__ == "__main__":
    _cable(sys.argv[1:3], float(sys.argv[3]))
