"""Makes a rank's communicator: among threads of one process, or among processes of one host or of several."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from narrows.comm.buffers import Buffers, SendBuffers
from narrows.comm.communicator import Communicator
from narrows.comm.hierarchical import Alone, HierarchicalTransport
from narrows.comm.process_groups import GlooTransport, open_gloo, open_transport
from narrows.comm.rendezvous import SharedState
from narrows.comm.shm_peers import ShmPeers, share
from narrows.comm.shm_transport import ShmTransport
from narrows.comm.thread_transport import ThreadTransport
from narrows.comm.transport import Transport
from narrows.layout import Mesh

__all__ = ["connect_process", "connect_thread"]

_CPU = torch.device("cpu")


def connect_thread(shared: SharedState, rank: int, device: torch.device = _CPU) -> Communicator:
    """The communicator of a rank thread; called in that thread."""
    mesh = shared.mesh
    transports = {
        ranks: ThreadTransport(shared.rendezvous(ranks), ranks.index(rank), len(ranks)) for ranks in _groups(mesh, rank)
    }
    comm = Communicator(
        mesh,
        rank,
        transports,
        checked=shared.checked,
        buffers=Buffers(device),
        device=device,
        transport=ThreadTransport.name,
    )
    shared.communicators[rank] = comm
    return comm


def connect_process(
    mesh: Mesh,
    rank: int,
    store: Any,
    *,
    checked: bool = False,
    device: torch.device = _CPU,
    address: str = "127.0.0.1",
    node: int = 0,
) -> Communicator:
    """Meets the other ranks of ``mesh`` and opens a transport to each group of ``rank``.

    Args:
        store: a ``torch.distributed`` store that all ranks have and nothing else uses.
        address: this host's address that the others can reach.
        node: this host's number, as the user gave it: ranks of different nodes share no memory.

    Raises:
        PeersLostError: the ranks did not find each other.
    """
    peers, why = None, ""
    if device.type == "cpu" and mesh.size > 1:
        peers, why = share(PrefixStore("shared memory", store), rank, mesh.size, node)
    buffers: SendBuffers = Buffers(device) if peers is None else peers.segment
    transports: dict[tuple[int, ...], Transport] = {}
    levels: dict[tuple[int, ...], Transport] = {}
    for slot, ranks in enumerate(_groups(mesh, rank)):
        if peers is not None and peers.share(ranks):
            transports[ranks] = ShmTransport(peers, ranks, slot)
        elif peers is not None and (hosts := peers.hosts(ranks)):
            transports[ranks] = gloo = open_gloo(store, ranks, rank, address)
            levels[ranks] = _in_two_levels(peers, hosts, slot, gloo)
        else:
            transports[ranks] = open_transport(store, ranks, rank, device, address)
    names = sorted({transport.name for transport in transports.values()})
    text = ", and ".join(reversed(names)) or "none among one rank"
    if levels:
        text = HierarchicalTransport.name
    elif names == [GlooTransport.name]:
        text += f" ({why})"
    elif len(names) > 1:
        text += " where groups cross hosts"
    return Communicator(
        mesh, rank, transports, checked=checked, buffers=buffers, device=device, transport=text, levels=levels
    )


def _in_two_levels(
    peers: ShmPeers, hosts: tuple[tuple[int, ...], ...], slot: int, network: GlooTransport
) -> HierarchicalTransport:
    host = next(i for i, ranks in enumerate(hosts) if peers.rank in ranks)
    within = Alone() if len(hosts[host]) == 1 else ShmTransport(peers, hosts[host], slot)
    return HierarchicalTransport(tuple(map(len, hosts)), host, within, network, peers.segment)


def _groups(mesh: Mesh, rank: int) -> list[tuple[int, ...]]:
    """The groups of several ranks along consecutive axes that ``rank`` is in; in the same order on every rank."""
    spans = [(first, last) for first in range(mesh.num_axes) for last in range(first + 1, mesh.num_axes + 1)]
    groups = dict.fromkeys(mesh.group(rank, first, last) for first, last in spans)
    return [ranks for ranks in groups if len(ranks) > 1]
