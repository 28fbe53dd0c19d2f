"""The ranks that share memory: they find each other on one host, map each other's segments, and notice ended processes.

Which ranks are on one host is what the user has given (the node number); they must be able to open each other's memory.
Ranks of different nodes do not share memory even if they could, as they can among network namespaces of one machine.

A segment has no name that could outlive its process. A peer opens it through /proc, as the same user in the same
process namespace, and recognises it by its nonce. Whether a group shares memory is decided from what all its members
have mapped, so that they decide alike.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import select
from itertools import groupby
from pathlib import Path
from typing import Any

from narrows.comm.segment import Segment, mapped
from narrows.comm.shm_calls import Functions, functions
from narrows.comm.transport import PeersLostError
from narrows.cost.environment import no_shared_memory

__all__ = ["ShmPeers", "share"]

_NONCE = 32


class ShmPeers:
    """The ranks of a world, seen from one of them: whose memory each has mapped."""

    def __init__(self, rank: int, functions: Functions, segment: Segment, addresses: dict[int, Any]) -> None:
        self.rank = rank
        self.functions = functions
        self.segment = segment
        self.maps: dict[int, mmap.mmap] = {rank: segment.map}
        self._pids = {other: address["pid"] for other, address in addresses.items() if address}
        self._nodes = {other: address["node"] for other, address in addresses.items() if address}
        self._pidfds: dict[int, int] = {}
        self._seen: dict[int, set[int]] = {}
        self._poll = select.poll()
        for other, address in addresses.items():
            if other == rank or not address or (address["node"], address["host"]) != (addresses[rank]["node"], _host()):
                continue
            if (found := _opened(address)) is not None:
                self.maps[other] = found
                self._watch(other)

    def agree(self, store: Any, size: int) -> None:
        """Exchanges with all ranks whose memory each has mapped. No rank opens anything after that."""
        store.set(f"seen by {self.rank}", json.dumps(sorted(self.maps)))
        self._seen = {other: set(json.loads(store.get(f"seen by {other}"))) for other in range(size)}
        os.close(self.segment.fd)

    def share(self, ranks: tuple[int, ...]) -> bool:
        """Whether all of ``ranks`` have mapped each other's memory."""
        return len(ranks) <= self.functions.limits.max_ranks and all(
            self._seen[rank].issuperset(ranks) for rank in ranks
        )

    def hosts(self, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """``ranks`` by host, where a group in two levels is possible: several hosts, a host's members one after the
        other and sharing memory, and somewhere more than one; else empty. The answer is the same on every member."""
        if not all(self._seen[rank] for rank in ranks):
            return ()  # one of them shares nothing
        runs = [tuple(run) for _, run in groupby(ranks, key=self._nodes.__getitem__)]
        several = 1 < len(runs) < len(ranks) and len({self._nodes[run[0]] for run in runs}) == len(runs)
        return tuple(runs) if several and all(map(self.share, runs)) else ()

    def starts(self, ranks: tuple[int, ...]) -> list[int]:
        """Where the segments of ``ranks`` lie in this process."""
        return [ctypes.addressof(ctypes.c_char.from_buffer(self.maps[rank])) for rank in ranks]

    def check(self, ranks: tuple[int, ...]) -> None:
        """Raises:
        PeersLostError: one of ``ranks`` has ended.
        """
        for fd, _ in self._poll.poll(0):
            rank = self._pidfds[fd]
            if rank in ranks:
                raise PeersLostError(f"the process {self._pids[rank]} of rank {rank} has ended")

    def _watch(self, rank: int) -> None:
        if self._pids[rank] == os.getpid():
            return  # ranks as threads
        try:
            fd = os.pidfd_open(self._pids[rank])
        except OSError:
            return  # it has ended already, or the kernel is too old: then the watchdog of all ranks notices
        self._pidfds[fd] = rank
        self._poll.register(fd, select.POLLIN)

    def __del__(self) -> None:
        for fd in self._pidfds:
            os.close(fd)


def share(store: Any, rank: int, size: int, node: int) -> tuple[ShmPeers | None, str]:
    """Meets the ranks ``0 .. size - 1`` of a world; each of them must call this, with a store of this use alone.

    ``node``: the number of this rank's host.

    Returns:
        (peers, why memory may not be shared with all of them). None: this rank shares none, as the others know.
    """
    compiled, segment, why = functions(), None, no_shared_memory()
    if compiled is not None and not why:
        try:
            segment = Segment(compiled.limits.blocks_start)
        except OSError as error:
            why = f"no shared memory: {error}"
    address: dict[str, Any] | None = None
    if segment is not None:
        nonce = secrets.token_bytes(_NONCE)
        segment.map[:_NONCE] = nonce
        address = {"node": node, "host": _host(), "pid": os.getpid(), "fd": segment.fd, "nonce": nonce.hex()}
    store.set(f"rank {rank}", json.dumps(address))
    addresses = {other: json.loads(store.get(f"rank {other}")) for other in range(size)}
    if segment is None or compiled is None:
        store.set(f"seen by {rank}", "[]")
        return None, why
    found = ShmPeers(rank, compiled, segment, addresses)
    found.agree(store, size)
    several = len({address["node"] for address in addresses.values() if address}) > 1
    return found, "they are on several hosts" if several else "these ranks cannot open each other's memory"


def _host() -> list[str]:
    """This boot of this host, and its process namespace."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return ["", str(os.getpid())]


def _opened(address: dict[str, Any]) -> mmap.mmap | None:
    """A peer's segment; None if this process may not open it."""
    try:
        fd = os.open(f"/proc/{address['pid']}/fd/{address['fd']}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = mapped(fd)
    except (OSError, ValueError):  # ValueError: another process's file, and too short
        return None
    finally:
        os.close(fd)
    return found if found[:_NONCE] == bytes.fromhex(address["nonce"]) else None
