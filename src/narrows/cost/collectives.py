"""Prices one collective: seconds by device, operation, ranks and bytes.

An all-reduce is NOT a reduce-scatter plus an all-gather in time: on NVSwitch machines it is faster than that pair at
the same width, so each operation has its own curve per device, group size and backend. Where no curve exists the next
best thing is taken and the source says so. All ranks are on one node here: a group larger than the largest measured one
is priced as if it sat in one such machine (between nodes: :mod:`narrows.cost.internode`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import pairwise
from types import MappingProxyType

from narrows.cost.devices import CollectiveSource, Device
from narrows.cost.measured import COLLECTIVES
from narrows.cost.price import ZERO, Curve, Price, Source, read_rows

__all__ = ["COLLECTIVES", "collective_price"]


def collective_price(device: Device, op: str, num_ranks: int, nbytes: int, *, graph: bool = True) -> Price:
    """Seconds of one collective among ``num_ranks`` ranks, by the fastest backend that was measured at that size.

    ``op`` is one of ``COLLECTIVES``. ``nbytes`` is the whole tensor: for all_reduce and reduce_scatter what every rank
    holds an addend of, for all_gather the gathered result, for all_to_all the sum over ranks of what each one sends
    (its own piece included). Rows that the backend pads are part of ``nbytes``: the caller counts them.

    ``graph`` says whether the step is replayed from a CUDA graph: small all-reduces are 10 times dearer when launched
    eagerly. One rank, or no bytes: ``ZERO``. Source: the device's table (NVIDIA AIConfigurator), or ``device.sources``.
    """
    return _collective_price(device, op, num_ranks, nbytes, graph)


@lru_cache(maxsize=1 << 16)
def _collective_price(device: Device, op: str, num_ranks: int, nbytes: int, graph: bool) -> Price:
    assert op in COLLECTIVES, f"no collective {op!r}; there are {', '.join(COLLECTIVES)}"
    assert num_ranks >= 1 and nbytes >= 0, f"{op} of {nbytes} bytes among {num_ranks} ranks"
    if num_ranks == 1 or nbytes == 0:
        return ZERO
    if device.collectives is None:
        return _link_price(device, op, num_ranks, nbytes)
    return _table_price(device.name, device.collectives, op, num_ranks, nbytes, graph)


def _table_price(name: str, source: CollectiveSource, op: str, num_ranks: int, nbytes: int, graph: bool) -> Price:
    counts, lent = _counts(source, op), False
    if op == "reduce_scatter" and num_ranks > counts[-1] < _counts(source, "all_gather")[-1]:
        op, counts, lent = "all_gather", _counts(source, "all_gather"), True  # in large NVLink domains only that was
    near = _near(counts, num_ranks)
    prices = [_priced_as(count, source, op, num_ranks, nbytes, graph) for count in near]
    if len(near) == 2:
        share = math.log(num_ranks / near[0]) / math.log(near[1] / near[0])
        low, high = (math.log(price.seconds) for price, _ in prices)
        return Price(math.exp(low + share * (high - low)), Source.SCALED)
    ((price, table),) = prices
    own = not lent and table == name and near[0] == num_ranks and source.time_factor == source.byte_factor == 1.0
    return price if own else Price(price.seconds, Source.SCALED)


def _priced_as(
    count: int, source: CollectiveSource, op: str, num_ranks: int, nbytes: int, graph: bool
) -> tuple[Price, str]:
    """The price by what was measured among ``count`` ranks, and the table that it is of."""
    # nccl-tests' size of an all-to-all is one rank's buffer, of everything else the full tensor.
    size = source.byte_factor * (nbytes / num_ranks if op == "all_to_all" else nbytes)
    candidates = _candidates(source, op, count, graph)
    # A backend exists at a size up to its last point; below its first point its latency is still what it costs.
    curves = [c for c in candidates if size <= c[1].xs[-1]] or list(candidates)
    best, table = min(((curve.at(size), table) for table, curve in curves), key=lambda found: found[0].seconds)
    # The ring factor: all_reduce moves 2 (n-1)/n of the tensor per rank, the others (n-1)/n; the 2 cancels.
    ring = (num_ranks - 1) / num_ranks * count / (count - 1)
    return Price(best.seconds * source.time_factor * ring, best.source), table


def _link_price(device: Device, op: str, num_ranks: int, nbytes: int) -> Price:
    """Latency plus each rank's traffic over what carries it; nothing of this was measured."""
    peers = (num_ranks - 1) / num_ranks
    if device.shared_memory:
        # Ranks read their peers' memory: a sum reads its share of every addend and writes it, a gather reads the
        # other shares and writes them beside its own, an all-reduce does both.
        reduce, gather = 1 + 1 / num_ranks, 2 * peers
        copies = {"all_reduce": reduce + gather, "reduce_scatter": reduce, "all_gather": gather}
        traffic = copies.get(op, 2 * peers / num_ranks) * nbytes
        return Price(device.link_latency_s + traffic / device.hbm_bytes_per_s, Source.ROOFLINE)
    sent = {"all_reduce": 2 * peers, "all_to_all": peers / num_ranks}.get(op, peers) * nbytes
    # With one link per peer (num_links > 1) a small group leaves the others idle.
    bandwidth = device.link_bytes_per_s * min(num_ranks - 1, device.num_links) / device.num_links
    return Price(device.link_latency_s + sent / bandwidth, Source.ROOFLINE)


@cache
def _curves() -> Mapping[tuple[str, str, int, str], Curve]:
    """Seconds over bytes, by (table, op, ranks, backend)."""
    points: dict[tuple[str, str, int, str], list[tuple[float, float]]] = {}
    columns = ("device", "op", "num_gpus", "bytes", "us", "backend")
    for table, op, count, nbytes, us, backend in read_rows("collectives.csv", columns):
        points.setdefault((table, op, int(count), backend), []).append((float(nbytes), float(us) * 1e-6))
    of_hosts = ("device", "op", "num_gpus", "nodes", "network", "bytes", "us")
    for table, op, count, nodes, _, nbytes, us in read_rows("collectives_hosts.csv", of_hosts):
        if nodes == "1":
            points.setdefault((table, op, int(count), "nccl"), []).append((float(nbytes), float(us) * 1e-6))
    return MappingProxyType({key: Curve.of(found) for key, found in points.items()})


@cache
def _candidates(source: CollectiveSource, op: str, count: int, graph: bool) -> tuple[tuple[str, Curve], ...]:
    """The curves to choose among, with the table of each: one per backend, lent where the own table has none."""
    backends = ("nccl", "custom_graph" if graph else "custom_eager")
    tables = (source.table, source.lender)
    found = []
    for backend in backends:
        for table in tables:
            if table is not None and (curve := _curves().get((table, op, count, backend))) is not None:
                found.append((table, curve))
                break
    return tuple(found)


@cache
def _counts(source: CollectiveSource, op: str) -> tuple[int, ...]:
    """The measured group sizes, in order."""
    counts = {key[2] for key in _curves() if key[0] in (source.table, source.lender) and key[1] == op}
    assert counts, f"table {source.table} has no {op}"
    return tuple(sorted(counts))


def _near(counts: tuple[int, ...], num_ranks: int) -> tuple[int, ...]:
    """The measured group size nearest to ``num_ranks`` by ratio; the two around it where they lie far apart.

    >>> [_near((2, 4, 8, 32), n) for n in (3, 8, 9, 16, 72)]
    [(4,), (8,), (8, 32), (8, 32), (32,)]
    """
    for low, high in pairwise(counts):
        if low < num_ranks < high and high > 2 * low:
            return low, high
    return (min(counts, key=lambda count: abs(math.log(count / num_ranks))),)
