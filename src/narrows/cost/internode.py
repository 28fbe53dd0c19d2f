"""Prices a collective among ranks on several nodes: as one call of the library, and the parts of a hierarchical one.

The public measurements are few (``data/collectives_hosts.csv``): all-reduce on 2 and 4 hosts of 8, all-gather on 2,
all-to-all on 2. A price is that of the nearest one, with two changes. Its bytes are multiplied by how much longer they
take through what the group has of the network. Its latency is changed by the steps that the group takes more or fewer.
At a measured point both are nothing. Where nothing was measured (CPUs, AMD) it is the price inside a node, and the
network's latency and bandwidth on top.

No price is below that of the same collective inside one node and the latency of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from types import MappingProxyType

from narrows.cost.collectives import collective_price
from narrows.cost.devices import CollectiveSource, Device
from narrows.cost.network import NETWORKS, Network
from narrows.cost.price import Curve, Price, Source, read_rows
from narrows.layout import Levels

__all__ = ["hierarchical_parts", "internode_price"]

_RING_STEP = 3.6e-6
"""Of a gather between hosts for each rank but one: 54.1 us among 16 H200, 28.1 us among 8 GB300."""
_TREE_BASE: Mapping[int, float] = MappingProxyType({2: 5.9e-6, 4: 9.3e-6, 8: 15.6e-6})
"""NCCL's all-reduce of few bytes inside a host, by ranks (H100): the part of one between hosts that is not network."""


def internode_price(
    device: Device, network: Network, op: str, levels: Levels, nbytes: int, *, graph: bool = True
) -> Price:
    """Seconds of one collective among all ranks of a group on several nodes, at once with the groups beside it.

    ``op``, ``nbytes`` and ``graph`` as in :func:`narrows.cost.collectives.collective_price`. A group on one node has
    the price of that function.
    """
    return _internode_price(device, network, op, levels, nbytes, graph)


def hierarchical_parts(op: str, levels: Levels, nbytes: int) -> tuple[tuple[str, Levels, int], ...]:
    """What a hierarchical collective does, one after the other: (op, among whom, bytes of the whole tensor there).

    ``op``: all_reduce, reduce_scatter or a gather, among equally many ranks on each node.

    >>> levels = Levels(num_ranks=8, num_nodes=2, per_node=4, sharing=1)
    >>> for part in hierarchical_parts("all_reduce", levels, 1000):
    ...     print(part)
    ('reduce_scatter', Levels(num_ranks=4, num_nodes=1, per_node=4, sharing=1), 1000)
    ('all_reduce', Levels(num_ranks=2, num_nodes=2, per_node=1, sharing=4), 250)
    ('all_gather', Levels(num_ranks=4, num_nodes=1, per_node=4, sharing=1), 1000)
    """
    share = -(-nbytes // levels.per_node)
    if op == "all_reduce":
        return (
            ("reduce_scatter", levels.within, nbytes),
            ("all_reduce", levels.between, share),
            ("all_gather", levels.within, nbytes),
        )
    if op == "reduce_scatter":
        return ((op, levels.within, nbytes), (op, levels.between, share))
    return ((op, levels.between, share), (op, levels.within, nbytes))


@lru_cache(maxsize=1 << 16)
def _internode_price(device: Device, network: Network, op: str, levels: Levels, nbytes: int, graph: bool) -> Price:
    inside = collective_price(device, op, levels.num_ranks, nbytes, graph=graph)
    if not levels.spans or not nbytes:
        return inside
    if device.collectives is None:
        return _modelled(device, network, op, levels, nbytes, inside)
    found = _from_table(device.name, device.collectives, network, op, levels, nbytes)
    least = inside.seconds + _crossings(op, levels) * network.latency_s
    return found if found.seconds >= least else Price(least, Source.SCALED)


# -- from measurements -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One sweep over sizes: seconds by bytes, as in data/collectives.csv."""

    device: str
    network: Network
    levels: Levels
    curve: Curve

    def at(self, network: Network, op: str, levels: Levels, size: float) -> Price:
        """Its price, changed to that of another group and network."""
        slower = _leaving(op, levels) / network.group_bytes_per_s(levels)
        slower /= _leaving(op, self.levels) / self.network.group_bytes_per_s(self.levels)
        price = self.curve.at(size * slower)
        later = _latency(op, levels, network) - _latency(op, self.levels, self.network)
        return Price(max(price.seconds + later, 0.0), price.source)

    def is_of(self, name: str, network: Network, levels: Levels) -> bool:
        """Whether it was measured on that device, network and group."""
        return (self.device, self.network, self.levels) == (name, network, levels)


@cache
def _runs() -> Mapping[str, Sequence[_Run]]:
    """The sweeps by operation, those on fewest nodes first."""
    columns = ("device", "op", "num_gpus", "nodes", "network", "bytes", "us")
    sweeps: dict[tuple[int, str, str, int, str], list[tuple[float, float]]] = {}
    for device, op, count, nodes, network, nbytes, us in read_rows("collectives_hosts.csv", columns):
        if network:
            sweep = sweeps.setdefault((int(nodes), op, device, int(count), network), [])
            sweep.append((float(nbytes), float(us) * 1e-6))
    found: dict[str, list[_Run]] = {}
    for (num_nodes, op, device, num_ranks, network), sweep in sorted(sweeps.items()):
        levels = Levels(num_ranks, num_nodes, num_ranks // num_nodes, sharing=1)
        run = _Run(device=device, network=NETWORKS[network], levels=levels, curve=Curve.of(sweep))
        found.setdefault(op, []).append(run)
    found["reduce_scatter"] = found["all_gather"]  # none was measured
    return MappingProxyType(found)


def _from_table(name: str, source: CollectiveSource, network: Network, op: str, levels: Levels, nbytes: int) -> Price:
    # nccl-tests' size of an all-to-all is one rank's buffer, of everything else the full tensor.
    size = nbytes / levels.num_ranks if op == "all_to_all" else nbytes
    runs = _runs()[op]
    if op == "all_reduce":
        price = _between_nodes(runs, network, op, levels, size)
    else:
        run = min(runs, key=lambda each: abs(math.log(each.network.bytes_per_s / network.bytes_per_s)))
        price = run.at(network, op, levels, size)
    own = op != "reduce_scatter" and any(run.is_of(name, network, levels) for run in runs)
    return Price(price.seconds * source.time_factor, price.source if own else Source.SCALED)


def _between_nodes(runs: Sequence[_Run], network: Network, op: str, levels: Levels, size: float) -> Price:
    """By the runs on the next fewer and the next more nodes, a straight line in the logarithm of their number."""
    nodes = levels.num_nodes
    for fewer, more in pairwise(runs):
        low, high = fewer.levels.num_nodes, more.levels.num_nodes
        if low < nodes < high:
            first, second = (
                run.at(network, op, replace(levels, num_nodes=run.levels.num_nodes), size).seconds
                for run in (fewer, more)
            )
            return Price(first + math.log(nodes / low) / math.log(high / low) * (second - first), Source.SCALED)
    return (runs[0] if nodes <= runs[0].levels.num_nodes else runs[-1]).at(network, op, levels, size)


def _leaving(op: str, levels: Levels) -> float:
    """What leaves a node, in sizes of the operation: of a ring each rank's traffic, of an all-to-all all of its own."""
    n, k = levels.num_ranks, levels.per_node
    return k * (n - k) / n if op == "all_to_all" else (n - 1) / n


def _latency(op: str, levels: Levels, network: Network) -> float:
    """What few bytes take, up to a constant of the operation."""
    steps = _crossings(op, levels)
    if op == "all_reduce":
        ranks = min(_TREE_BASE, key=lambda known: abs(math.log(known / levels.per_node)))
        return _TREE_BASE[ranks] + steps * network.latency_s
    if op == "all_to_all":
        return steps * network.latency_s
    # A step of the measured rings has InfiniBand's or RoCE's latency in it where it crosses.
    return (levels.num_ranks - 1) * _RING_STEP + steps * (network.latency_s - NETWORKS["ib-400"].latency_s)


def _crossings(op: str, levels: Levels) -> float:
    """Steps between nodes, one after the other: up and down a tree, along a ring, or all at once."""
    if op == "all_reduce":
        return 2 * math.log2(levels.num_nodes)
    return 1 if op == "all_to_all" else levels.num_nodes - 1


# -- without measurements ----------------------------------------------------------------------------------------------


def _modelled(device: Device, network: Network, op: str, levels: Levels, nbytes: int, inside: Price) -> Price:
    """The price inside a node, and latency and bytes of the network after it."""
    n, k = levels.num_ranks, levels.per_node
    bandwidth = network.group_bytes_per_s(levels)
    if not device.is_cpu:
        passes = 2 if op == "all_reduce" else 1
        leaving = passes * _leaving(op, levels) * (nbytes / n if op == "all_to_all" else nbytes)
        return Price(inside.seconds + _crossings(op, levels) * network.latency_s + leaving / bandwidth, Source.ROOFLINE)
    # This engine's own transport between CPUs sends every piece from where it lies to each rank that needs it.
    piece = nbytes / n / n if op == "all_to_all" else nbytes / n
    exchange = network.latency_s + k * (n - k) * piece / bandwidth
    if op == "all_reduce":
        # The sum of its own part, and the gather of these; or, of few bytes, everything to everyone in one exchange.
        exchange = min(2 * exchange, network.latency_s + k * (n - k) * nbytes / bandwidth)
    return Price(inside.seconds + exchange, Source.ROOFLINE)
