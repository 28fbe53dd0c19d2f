"""Ranks on several hosts: which ranks each process starts, and how the processes find the coordinator.

Ranks on one host need none of this. Processes on several hosts were started either by torchrun, one per rank, or by a
person, one per host (``--nnodes``). They find the coordinator through a torch store. The network between the hosts
must be trusted: whoever can reach the store can read the key from it, unless the environment variable ``NARROWS_KEY``
is set to the same secret on all hosts. Torch's own messages are not authenticated at all.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import sha256
from typing import Any, Literal

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from narrows.errors import ConfigError, RankError
from narrows.layout import split_evenly, starts
from narrows.ranks.channel import listen, resolve
from narrows.ranks.messages import Contact
from narrows.ranks.timing import TIMING, Timing

__all__ = [
    "Launch",
    "Series",
    "announce_end",
    "coordinator_key",
    "find_coordinator",
    "join_store",
    "next_contact",
    "open_store",
    "publish",
]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Series:
    """Counts the worlds that a command has started."""

    def __init__(self) -> None:
        self.started = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This process's part in a world whose processes were not all started by one narrows process.

    ``ranks``: the ranks that this process starts. Under torchrun (``by_torchrun``) this process is its one rank, except
    that the coordinator starts rank 0 as its own process. ``node`` numbers the hosts.
    """

    address: str
    port: int
    world_size: int
    ranks: tuple[int, ...]
    node: int
    num_nodes: int
    local_rank: int = 0
    """Number of the first of ``ranks`` on its host."""
    local_world_size: int = 1
    """Ranks on this host, if torchrun started them."""
    by_torchrun: bool = False
    store_is_served: bool = False
    run: str = ""
    series: Series | None = None
    """Set for a command that starts several worlds, one after the other or at once: each has its own port."""

    @property
    def num_local_ranks(self) -> int:
        """Ranks on this host."""
        return self.local_world_size if self.by_torchrun else len(self.ranks)

    @property
    def is_coordinator(self) -> bool:
        """Whether this process schedules and hands out calls."""
        return 0 in self.ranks

    def world(self, number: int | None = None) -> Launch:
        """The launch of that world of a series, or of the next one; itself if there is only one."""
        if self.series is None:
            return self
        if number is None:
            number = self.series.started
            self.series.started += 1
        if self.port + number > 65535:
            raise ConfigError(f"--master-port {self.port} leaves no port for world {number} of this command: lower it")
        return replace(self, port=self.port + number, series=None)

    @classmethod
    def of_nodes(
        cls, *, world_size: int, num_nodes: int, node: int | None, address: str | None, port: int | None
    ) -> Launch:
        """One process per host, started by hand. Ranks are assigned to the nodes in order.

        Raises:
            ConfigError: a value is missing or out of range.
        """
        if num_nodes < 1 or num_nodes > world_size:
            raise ConfigError(f"--nnodes is {num_nodes}; it must be between 1 and the {world_size} ranks of the mesh")
        if node is None or not 0 <= node < num_nodes:
            raise ConfigError(f"--node-rank must be between 0 and {num_nodes - 1}: this host's number among --nnodes")
        if address is None or port is None:
            raise ConfigError("--nnodes needs --master-addr and --master-port: where node 0 listens")
        if not 0 < port < 65536:
            raise ConfigError(f"--master-port is {port}; it must be between 1 and 65535")
        first, stop = starts(split_evenly(world_size, num_nodes))[node]
        return cls(
            address=address,
            port=port,
            world_size=world_size,
            ranks=tuple(range(first, stop)),
            node=node,
            num_nodes=num_nodes,
        )

    @classmethod
    def of_torchrun(cls, environment: Mapping[str, str], *, world_size: int | None) -> Launch | None:
        """This process's launch, read from torchrun's environment variables; None if torchrun did not start it.

        ``world_size``: ranks of the mesh; None: as many as torchrun has started.

        Raises:
            ConfigError: torchrun started another number of processes than the mesh has ranks.
        """
        if not all(name in environment for name in _TORCHRUN):
            return None
        rank, started = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        world_size = started if world_size is None else world_size
        if started != world_size:
            raise ConfigError(
                f"torchrun started {started} processes, but the mesh has {world_size} ranks: make --nnodes x "
                f"--nproc-per-node of torchrun {world_size}, or start narrows without torchrun (unset RANK)"
            )
        local = int(environment.get("LOCAL_WORLD_SIZE", started))
        return cls(
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            world_size=world_size,
            ranks=(rank,),
            node=int(environment.get("GROUP_RANK", rank // local)),
            num_nodes=-(-started // local),
            local_rank=int(environment["LOCAL_RANK"]),
            local_world_size=local,
            by_torchrun=True,
            store_is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            run=f"{environment.get('TORCHELASTIC_RUN_ID', '')} {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        )


def open_store(launch: Launch | None, join_s: float) -> tuple[Any, str, int]:
    """The coordinator's store, and the address and port to reach it at.

    The coordinator serves the store itself, unless torchrun's agent serves one already.

    Raises:
        ConfigError: the address is not this host's, or its port is taken.
    """
    if launch is not None and launch.store_is_served:
        store = TCPStore(launch.address, launch.port, is_master=False, timeout=timedelta(seconds=join_s))
        return store, launch.address, launch.port
    address, port = (launch.address, launch.port) if launch else ("127.0.0.1", 0)
    try:
        sock = listen(address, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address} port {port}: {error.strerror}; is it this host's?") from None
    port = sock.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=join_s),
        master_listen_fd=sock.detach(),
    )
    return store, address, port


def coordinator_key() -> bytes:
    """A new key for ranks that are about to start: random, or made from ``NARROWS_KEY``."""
    given = os.environ.get("NARROWS_KEY")
    return sha256(given.encode()).digest() if given else secrets.token_bytes(32)


def publish(launch: Launch, store: Any, contact: Contact) -> None:
    """Writes the coordinator's address to the store, for the processes on other hosts.

    Raises:
        ConfigError: the address cannot be reached from other hosts.
    """
    _, (address, _) = resolve(launch.address, launch.port)
    is_name = launch.address not in (address, "localhost")
    if launch.num_nodes > 1 and is_name and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"the master address {launch.address} is {address} on this host, where other hosts would not find it: "
            "give its address in their network as numbers"
        )
    key = "" if "NARROWS_KEY" in os.environ else contact.key.hex()
    entry = {"address": launch.address, "port": contact.port, "key": key, "timing": asdict(contact.timing)}
    PrefixStore(f"narrows {launch.run}", store).set("coordinator", json.dumps(entry))


def find_coordinator(launch: Launch, join_s: float = TIMING.join_s) -> Contact:
    """Waits for the coordinator to publish where it listens and which timing it uses.

    Raises:
        RankError: no coordinator published itself within ``join_s``.
    """
    try:
        store = join_store(launch.address, launch.port, f"narrows {launch.run}", join_s)
        entry = json.loads(store.get("coordinator"))
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise RankError(
            f"node {launch.node}: no coordinator at {launch.address} port {launch.port} for {join_s:g} s ({line})"
        ) from None
    return _contact(entry)


def announce_end(launch: Launch, wait_s: float = 10.0) -> None:
    """Tells the other nodes of a series that no world follows, and waits until they know, or are gone."""
    last = launch.world()
    store, _, _ = open_store(last, wait_s)
    mine = PrefixStore(f"narrows {last.run}", store)
    mine.set("coordinator", json.dumps({"is_over": True}))
    end = time.monotonic() + wait_s
    while mine.add("end seen", 0) < last.num_nodes - 1 and time.monotonic() < end:
        time.sleep(0.05)


def next_contact(launch: Launch) -> Contact | Literal[False] | None:
    """Where the coordinator of a world of a series listens, if it does so now; None: no world follows; False: not yet.

    Raises:
        OSError: the address has no meaning here.
    """
    _, where = resolve(launch.address, launch.port)
    try:
        with socket.create_connection(where, 1.0):
            pass
        store = join_store(launch.address, launch.port, f"narrows {launch.run}", 5.0)
        entry = json.loads(store.get("coordinator"))
    except (OSError, RuntimeError):
        return False
    if entry.get("is_over"):
        with contextlib.suppress(RuntimeError):  # the coordinator has not waited
            store.add("end seen", 1)
        return None
    return _contact(entry)


def _contact(entry: Mapping[str, Any]) -> Contact:
    key = bytes.fromhex(entry["key"]) if entry["key"] else coordinator_key()
    return Contact(address=entry["address"], port=entry["port"], key=key, timing=Timing(**entry["timing"]))


def join_store(address: str, port: int, prefix: str, join_s: float) -> Any:
    """The part of a store, served by another process, that lies under ``prefix``."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=join_s))
    return PrefixStore(prefix, store)
