"""Which ranks of a world run on which host, and how those on other hosts find the one that hosts it.

Knows addresses, environment variables and a store of torch's; starts no process. Ranks on one host alone need none of
this. Either torchrun started one process per rank (its environment says so), or a person started narrows once per host
(``--nnodes``). The network between the hosts must be trusted: who can reach the store can read the key from it, unless
the environment variable ``NARROWS_KEY`` is set, on all hosts alike; torch's own messages carry no proof at all.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from narrows.errors import ConfigError, RankError
from narrows.layout import deal, starts
from narrows.ranks.channel import listen, resolve
from narrows.ranks.messages import Contact
from narrows.ranks.timing import TIMING, Timing

__all__ = ["Launch", "find_host", "host_key", "join_store", "open_store", "publish"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This process's part in a world whose processes were not all started by narrows itself.

    ``ranks`` are those that this process starts (``by_torchrun``: is, except that the host starts its rank), the first
    of them number ``place`` on its machine.
    """

    address: str
    port: int
    size: int
    ranks: tuple[int, ...]
    node: int
    num_nodes: int
    place: int = 0
    places: int = 1
    """Ranks on this host, where torchrun started them."""
    by_torchrun: bool = False
    store_is_served: bool = False
    run: str = ""

    @property
    def num_here(self) -> int:
        """Ranks on this host."""
        return self.places if self.by_torchrun else len(self.ranks)

    @property
    def hosts(self) -> bool:
        """Whether this process is the host: it schedules, and hands out calls."""
        return 0 in self.ranks

    @classmethod
    def of_nodes(cls, *, size: int, num_nodes: int, node: int | None, address: str | None, port: int | None) -> Launch:
        """One process per host, started by hand; ranks are dealt to the nodes in order.

        Raises:
            ConfigError: something is missing, or cannot be.
        """
        if num_nodes < 1 or num_nodes > size:
            raise ConfigError(f"--nnodes is {num_nodes}; it must be between 1 and the {size} ranks of the mesh")
        if node is None or not 0 <= node < num_nodes:
            raise ConfigError(f"--node-rank must be between 0 and {num_nodes - 1}: this host's place among --nnodes")
        if address is None or port is None:
            raise ConfigError("--nnodes needs --master-addr and --master-port: where node 0 listens")
        if not 0 < port < 65536:
            raise ConfigError(f"--master-port is {port}; it must be between 1 and 65535")
        first, stop = starts(deal(size, num_nodes))[node]
        return cls(
            address=address, port=port, size=size, ranks=tuple(range(first, stop)), node=node, num_nodes=num_nodes
        )

    @classmethod
    def of_torchrun(cls, environment: Mapping[str, str], *, size: int | None) -> Launch | None:
        """The process that torchrun started, by its environment; None if it did not.

        ``size``: ranks of the mesh; None: as many as it has started.

        Raises:
            ConfigError: it started another number of processes than the mesh has ranks.
        """
        if not all(name in environment for name in _TORCHRUN):
            return None
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        size = world if size is None else size
        if world != size:
            raise ConfigError(
                f"torchrun started {world} processes, but the mesh has {size} ranks: make --nnodes x --nproc-per-node "
                f"of torchrun {size}, or start narrows without torchrun (unset RANK)"
            )
        local = int(environment.get("LOCAL_WORLD_SIZE", world))
        return cls(
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            size=size,
            ranks=(rank,),
            node=int(environment.get("GROUP_RANK", rank // local)),
            num_nodes=-(-world // local),
            place=int(environment["LOCAL_RANK"]),
            places=local,
            by_torchrun=True,
            store_is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            run=f"{environment.get('TORCHELASTIC_RUN_ID', '')} {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        )


def open_store(launch: Launch | None, join_s: float) -> tuple[Any, str, int]:
    """The host's store, served by itself unless torchrun's agent does; with the address to reach it at.

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


def host_key() -> bytes:
    """The key of ranks that are about to be started."""
    given = os.environ.get("NARROWS_KEY")
    return sha256(given.encode()).digest() if given else secrets.token_bytes(32)


def publish(launch: Launch, store: Any, contact: Contact) -> None:
    """Tells the processes on other hosts where the host listens.

    Raises:
        ConfigError: its address is one that they cannot reach.
    """
    _, (address, _) = resolve(launch.address, launch.port)
    is_name = launch.address not in (address, "localhost")
    if launch.num_nodes > 1 and is_name and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"the master address {launch.address} is {address} on this host, where other hosts would not find it: "
            "give its address in their network as numbers"
        )
    key = "" if "NARROWS_KEY" in os.environ else contact.key.hex()
    said = json.dumps({"address": launch.address, "port": contact.port, "key": key, "timing": asdict(contact.timing)})
    PrefixStore(f"narrows {launch.run}", store).set("host", said)


def find_host(launch: Launch, join_s: float = TIMING.join_s) -> Contact:
    """Waits for the host and asks it where it listens, and what durations it goes by.

    Raises:
        RankError: it is not there.
    """
    try:
        store = join_store(launch.address, launch.port, f"narrows {launch.run}", join_s)
        said = json.loads(store.get("host"))
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise RankError(
            f"node {launch.node}: no host at {launch.address} port {launch.port} for {join_s:g} s ({line})"
        ) from None
    key = bytes.fromhex(said["key"]) if said["key"] else host_key()
    return Contact(address=said["address"], port=said["port"], key=key, timing=Timing(**said["timing"]))


def join_store(address: str, port: int, prefix: str, join_s: float) -> Any:
    """The part of a store, served by another process, that lies under ``prefix``."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=join_s))
    return PrefixStore(prefix, store)
