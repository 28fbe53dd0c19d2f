"""Prices of collectives among ranks on several nodes: the measured points, and what follows from them. No torch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cost import COLLECTIVES, DEVICES, ZERO, Source, collective_price, device
from narrows.cost.internode import hierarchical_parts, internode_price
from narrows.cost.network import NETWORKS, network
from narrows.cost.price import read_rows
from narrows.errors import ConfigError
from narrows.layout import Levels, Mesh, Topology

MIB = 1 << 20
POINTS = read_rows("collectives_hosts.csv", ("device", "op", "num_gpus", "nodes", "network", "bytes", "us"))


def world(nodes: int, per_node: int) -> Levels:
    (levels,) = Topology(nodes, per_node).levels(Mesh.of(dp=1, tp=nodes * per_node).groups(0, 2))
    return levels


def seconds(name: str, op: str, levels: Levels, nbytes: int, by: str = "", graph: bool = True) -> float:
    found = device(name)
    return internode_price(found, network(by or found.network), op, levels, nbytes, graph=graph).seconds


def one_of(found: Topology, mesh: Mesh, first: int, last: int) -> Levels:
    return found.levels(mesh.groups(first, last))[0]


@pytest.mark.parametrize(
    "point", [point for point in POINTS if point[0] in DEVICES and point[4]], ids=lambda point: "-".join(point[:6])
)
def test_a_published_point_is_the_price(point: list[str]) -> None:
    name, op, count, nodes, by, nbytes, us = point
    found = internode_price(
        device(name), network(by), op, world(int(nodes), int(count) // int(nodes)), int(nbytes), graph=True
    )
    assert found.seconds == pytest.approx(float(us) * 1e-6)
    assert found.source == Source.MEASURED


def test_points_of_an_nvlink_domain_are_of_one_node() -> None:
    inside = [point for point in POINTS if not point[4]]
    assert len(inside) == 22 and {point[3] for point in inside} == {"1"}
    for name, op, count, _, _, nbytes, us in inside:
        found = collective_price(device(name), op, int(count), int(nbytes))
        assert found.seconds == pytest.approx(float(us) * 1e-6) and found.source == Source.MEASURED
        lent = collective_price(device(name), "reduce_scatter", int(count), int(nbytes))
        assert lent.seconds == found.seconds and lent.source == Source.SCALED


def test_the_table_of_what_was_published_in_words() -> None:
    # Microseconds, of 16 KiB, 1 MiB, 64 MiB and 512 MiB.
    for name, op, levels, expected in (
        ("h100", "all_reduce", world(2, 8), (32, 71, 466, 2355)),
        ("h100", "all_reduce", world(4, 8), (46, 82, 574, 3109)),
        ("h200", "all_gather", world(2, 8), (57, 77, 278, 1576)),
    ):
        by = "roce-400" if op == "all_gather" else "ib-400"
        for nbytes, us in zip((16 << 10, MIB, 64 * MIB, 512 * MIB), expected, strict=True):
            assert abs(seconds(name, op, levels, nbytes, by) * 1e6 - us) < 0.6


@st.composite
def groups(draw: st.DrawFn) -> Levels:
    """A group of some mesh on several nodes."""
    mesh = Mesh.of(dp=draw(st.integers(1, 8)), tp=draw(st.integers(1, 8)))
    counts = [n for n in range(2, mesh.size + 1) if mesh.size % n == 0]
    nodes = draw(st.sampled_from(counts or [1]))
    found = [
        levels
        for first, last in ((0, 1), (1, 2), (0, 2))
        for levels in Topology(nodes, mesh.size // nodes).levels(mesh.groups(first, last))
        if levels.spans
    ]
    return draw(st.sampled_from(found or [world(2, 2)]))


asked = st.sampled_from(sorted(DEVICES)), st.sampled_from(COLLECTIVES), groups()
sizes = st.integers(1, 2048 * MIB)
networks = st.sampled_from(sorted(NETWORKS))


@settings(deadline=None)
@given(*asked, sizes, networks, st.booleans())
def test_never_cheaper_than_within_one_node(
    name: str, op: str, levels: Levels, nbytes: int, by: str, graph: bool
) -> None:
    inside = collective_price(device(name), op, levels.num_ranks, nbytes, graph=graph).seconds
    assert seconds(name, op, levels, nbytes, by, graph) >= inside + network(by).latency_s * 0.999


@settings(deadline=None)
@given(*asked, sizes, st.floats(1.0, 64.0), networks)
def test_more_bytes_cost_no_less(name: str, op: str, levels: Levels, nbytes: int, factor: float, by: str) -> None:
    # The measured sweeps scatter: 2 KiB took 1.5 % less than 1 KiB, and prices inside a node more (of 6 us).
    more = seconds(name, op, levels, int(nbytes * factor), by)
    assert seconds(name, op, levels, nbytes, by) <= more * 1.02 + 7e-6


@settings(deadline=None)
@given(*asked, sizes, st.sampled_from([("ib-800", "ib-400"), ("ib-400", "ib-200"), ("ethernet-10", "ethernet-1")]))
def test_a_slower_network_costs_no_less(name: str, op: str, levels: Levels, nbytes: int, pair: tuple[str, str]) -> None:
    fast, slow = (seconds(name, op, levels, nbytes, by) for by in pair)
    if op in ("all_reduce", "all_to_all") or device(name).collectives is None:  # gathers: another sweep at 800 Gb/s
        assert fast <= slow * 1.02 + 1e-9


@settings(deadline=None)
@given(st.sampled_from(sorted(DEVICES)), st.sampled_from(COLLECTIVES), st.integers(1, 16), sizes)
def test_one_node_has_the_price_it_had(name: str, op: str, num_ranks: int, nbytes: int) -> None:
    levels = Levels(num_ranks, 1, num_ranks, 1)
    found = device(name)
    assert internode_price(found, network("ethernet-1"), op, levels, nbytes) == collective_price(
        found, op, num_ranks, nbytes
    )


def test_nothing_to_move_costs_nothing() -> None:
    for found in DEVICES.values():
        for op in COLLECTIVES:
            assert internode_price(found, network("ib-400"), op, world(2, 8), 0) == ZERO


def test_more_nodes_cost_more_by_their_latency_then_by_bandwidth() -> None:
    few = [seconds("h100", "all_reduce", world(nodes, 8), 16 << 10) for nodes in (2, 3, 4, 8, 16)]
    assert few == sorted(few)
    doubling = 2 * NETWORKS["ib-400"].latency_s
    assert few[3] - few[2] == pytest.approx(doubling, rel=0.01)
    assert few[4] - few[3] == pytest.approx(doubling, rel=0.01)
    assert few[0] < few[1] < few[2]
    many = [seconds("h100", "all_reduce", world(nodes, 8), 1024 * MIB) for nodes in (4, 16)]
    assert many[1] < 1.05 * many[0], "the bus bandwidth of 4 hosts holds on more"


def test_pairs_across_hosts_have_one_card_each() -> None:
    # dp 2 x tp 8 on 2 hosts: the pairs along dp have one rank on each, all at once.
    pair = one_of(Topology(2, 8), Mesh.of(dp=2, tp=8), 0, 1)
    assert pair == Levels(2, 2, 1, 8)
    nbytes = 512 * MIB
    assert nbytes / seconds("h100", "all_reduce", pair, nbytes) == pytest.approx(50e9, rel=0.2)
    # With one card for all of them each has an eighth of it.
    shared = seconds("h100", "all_reduce", pair, nbytes, "ethernet-100")
    assert nbytes / shared == pytest.approx(0.94 * 12.5e9 / 8, rel=0.2)


def test_an_all_to_all_runs_at_the_speed_of_a_card() -> None:
    # 16 ranks: 8 of 15 pieces leave the host. 512 MiB in each rank's buffer.
    nbytes = 16 * 512 * MIB
    leaving = nbytes / 16 * 8 / 16
    assert leaving / seconds("h100", "all_to_all", world(2, 8), nbytes) == pytest.approx(46.5e9, rel=0.05)
    assert leaving / seconds("h100", "all_to_all", world(2, 8), nbytes, "ib-200") == pytest.approx(23.3e9, rel=0.05)


def test_cpus_exchange_every_piece_with_every_rank_that_needs_it() -> None:
    # 2 x 2 ranks, 4 MiB, one card of 1 Gb/s: each rank has 1 MiB, which two ranks on the other host need.
    inside = {op: collective_price(device("cpu-core"), op, 4, 4 * MIB).seconds for op in COLLECTIVES}
    rate, latency = 0.94e9 / 8, 100e-6
    for op, exchanges in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        expected = inside[op] + exchanges * (latency + 2 * 2 * MIB / rate)
        assert seconds("cpu-core", op, world(2, 2), 4 * MIB, "ethernet-1") == pytest.approx(expected)
    # A few bytes go to everyone at once: one latency, not two.
    few = seconds("cpu-core", "all_reduce", world(2, 2), 2048, "ethernet-1")
    inside_few = collective_price(device("cpu-core"), "all_reduce", 4, 2048).seconds
    assert few == pytest.approx(inside_few + latency + 2 * 2 * 2048 / rate)


@given(st.sampled_from(["all_reduce", "reduce_scatter", "all_gather"]), st.integers(2, 8), st.integers(2, 8), sizes)
def test_a_hierarchy_sends_every_piece_over_the_network_once(op: str, nodes: int, per: int, nbytes: int) -> None:
    parts = hierarchical_parts(op, world(nodes, per), nbytes)
    between = [part for part in parts if part[1].spans]
    assert between == [(op, Levels(nodes, nodes, 1, per), -(-nbytes // per))]
    assert all(levels.num_ranks == per and size == nbytes for _, levels, size in parts if not levels.spans)
    order = [levels.spans for _, levels, _ in parts]
    assert (
        order == {"all_reduce": [False, True, False], "reduce_scatter": [False, True], "all_gather": [True, False]}[op]
    )


def test_a_hierarchy_pays_where_ranks_share_a_slow_card_and_not_where_nccl_has_one_of_its_own() -> None:
    def hierarchical(name: str, by: str, op: str, levels: Levels, nbytes: int) -> float:
        return sum(
            internode_price(device(name), network(by), part, among, size).seconds
            for part, among, size in hierarchical_parts(op, levels, nbytes)
        )

    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        flat = seconds("cpu-core", op, world(2, 2), 4 * MIB, "ethernet-1")
        assert hierarchical("cpu-core", "ethernet-1", op, world(2, 2), 4 * MIB) < 0.7 * flat
    for nbytes in (16 << 10, MIB, 64 * MIB):
        flat = seconds("h100", "all_reduce", world(2, 8), nbytes)
        assert hierarchical("h100", "ib-400", "all_reduce", world(2, 8), nbytes) > flat


def test_every_device_has_a_network_and_every_network_a_source() -> None:
    for found in DEVICES.values():
        assert network(found.network).source
    assert all(found.name == name and found.latency_s > 0 for name, found in NETWORKS.items())
    assert network("ib-400").words == "ib-400 (InfiniBand NDR, 50 GB/s per rank)"
    assert network("ethernet-10").words == "ethernet-10 (10 Gb/s Ethernet, TCP, 1.18 GB/s per host)"
    with pytest.raises(ConfigError, match="unknown network 'ib-300'; known networks: ib-200, ib-400"):
        network("ib-300")
