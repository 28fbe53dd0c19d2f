"""Groups that lie on several hosts: shared memory within each, gloo between them; the hosts are numbers told to ranks.

The ranks are threads of this process, or processes of this machine that were told different nodes.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ranks_lab as lab
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S
from test_processes_faults import QUICK, at_once, without_calls
from test_transports import FAULTS, assert_same
from torch import Tensor
from transports_lab import BOTH, run_over

from narrows.comm import Communicator
from narrows.comm.shm_calls import functions
from narrows.cost.profile import read_profile
from narrows.engine.config import EngineConfig, resolve
from narrows.errors import CollectiveMismatchError, ConfigError, RankError
from narrows.layout import Mesh, starts
from narrows.native import why_absent
from narrows.ranks import Launch, ProcessRanks
from narrows.ranks.launch import Series, announce_end
from narrows.ranks.node import run_node, run_series

pytestmark = pytest.mark.skipif(functions() is None, reason=f"no shared memory without compiled code: {why_absent()}")

COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 17, 130, 400]), min_size=6, max_size=6)
WORLDS = [
    (Mesh.of(dp=2, tp=2), (0, 0, 1, 1)),
    (Mesh.of(dp=1, tp=4), (0, 0, 1, 1)),
    (Mesh.of(dp=1, tp=3), (0, 0, 1)),
    (Mesh.of(dp=1, tp=5), (0, 0, 0, 1, 1)),
    (Mesh.of(dp=1, tp=4), (0, 1, 1, 2)),
    (Mesh.of(dp=3, tp=2), (0, 0, 1, 1, 2, 2)),
]


def summed_by_hosts(parts: Sequence[tuple[int, Tensor]], addends: Sequence[Tensor]) -> Tensor:
    """The sum that the transport promises, of (host, part) in rank order."""
    hosts = [[part.float() for _, part in run] for _, run in itertools.groupby(parts, key=lambda each: each[0])]
    dtype, sums = parts[0][1].dtype, []
    for held in hosts:
        total = held[0]
        for part in held[1:]:
            total = total + part
        sums.append(total if len(hosts) == 1 else total.to(dtype).float())
    total = sums[0]
    for part in (*sums[1:], *addends):
        total = total + part.float()
    return total.to(dtype)


def wanted_sums(
    mesh: Mesh, hosts: Sequence[int], rank: int, counts: Sequence[int], width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `lab.collectives` must find for its reductions."""
    found: dict[str, Tensor] = {}
    for ranks in lab.groups_of(mesh, rank):
        split = tuple(counts[: len(ranks)])
        parts = [(hosts[each], lab.rough(each, sum(split), width, dtype=dtype)) for each in ranks]
        for name, joins in (("", False), (" joined", True)):
            pieces = []
            for each, (start, stop) in zip(ranks, starts(split), strict=True):
                own = [(host, part[start:stop]) for host, part in parts]
                rows = stop - start
                joined = [lab.rough(100 + each, rows, width, dtype=dtype), lab.rough(200 + each, rows, width)]
                pieces.append(summed_by_hosts(own, joined if joins else ()))
            found[f"{ranks} {split} all_reduce{name}"] = torch.cat(pieces)
            found[f"{ranks} {split} reduce_scatter{name}"] = pieces[ranks.index(rank)]
    return found


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(WORLDS),
    COUNTS,
    st.sampled_from([0, 1, 33, 511]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    st.booleans(),
)
def test_sums_are_taken_host_by_host_and_rows_arrive_as_they_are(
    world: tuple[Mesh, tuple[int, ...]], counts: list[int], width: int, dtype: torch.dtype, checked: bool
) -> None:
    """Uneven rows, one row, none; hosts of different sizes. Every rank has the bits of the promised order."""
    mesh, hosts = world

    def rank(comm: Communicator) -> dict[str, Tensor]:
        return lab.collectives(comm, counts, width, dtype)

    want = run_over("threads", mesh, rank)  # for all that is no sum
    for each, found in enumerate(want):
        found |= wanted_sums(mesh, hosts, each, counts, width, dtype)
    assert_same(run_over(BOTH, mesh, rank, checked=checked, hosts=hosts), want)


def test_the_order_of_the_sum_matters() -> None:
    """Guards the test above: the sum of one host has other bits."""
    parts = [(host, lab.rough(i, 50, 7, dtype=torch.bfloat16)) for i, host in enumerate((0, 0, 1, 1))]
    assert not torch.equal(summed_by_hosts(parts, ()), summed_by_hosts([(0, part) for _, part in parts], ()))


@pytest.mark.parametrize("how", FAULTS)
def test_checked_mode_names_the_rank_that_made_another_call(how: str) -> None:
    def rank(comm: Communicator) -> tuple[str, float]:
        return lab.differing(comm, how), 3.0 if how == "number" else lab.sum_of(comm, 0.0)

    (text, total), *others = run_over(BOTH, Mesh.of(dp=1, tp=3), rank, checked=True, hosts=(0, 0, 1))
    assert others == [(text, total)] * 2 and total == 3.0
    assert text.startswith(f"ranks met in different collectives: rank 1 came to #{1 if how == 'number' else 0} ")
    assert ", ranks 0, 2 to #0 " in text


@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 1)])
def test_results_and_inputs_belong_to_the_caller(hosts: Sequence[int]) -> None:
    mesh = Mesh.of(dp=1, tp=3)
    run_over(BOTH, mesh, lab.results_are_nobody_elses, hosts=hosts)
    run_over(BOTH, mesh, lambda comm: lab.inputs_may_be_written_again(comm, 10, 200), hosts=hosts)
    run_over(BOTH, mesh, lab.send_buffers, hosts=hosts)


@pytest.mark.parametrize(
    ("hosts", "transport"),
    [
        ((0, 0, 0, 0), "shared memory"),
        ((0, 1, 2, 3), "gloo over TCP (they are on several hosts)"),
        ((0, 1, 0, 1), "gloo over TCP (they are on several hosts)"),  # a host's ranks do not lie together
        ((0, 0, 1, 1), BOTH),
    ],
)
def test_the_told_hosts_decide_how_ranks_meet(hosts: Sequence[int], transport: str) -> None:
    """Also where all could open each other's memory: ranks of different nodes use the network."""
    mesh = Mesh.of(dp=1, tp=4)
    name = transport.partition(" (")[0]
    said = run_over(name, mesh, lambda comm: (comm.transport, lab.sum_of(comm, 1.0)), hosts=hosts)
    assert said == [(said[0][0], 10.0)] * 4 and said[0][0].startswith(transport)


def test_one_rank_alone_in_two_levels_is_named() -> None:
    """The others meet flat: the way is a part of the call."""

    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            lab.in_two_levels(comm)
        lab.sum_of(comm, 1.0)

    with pytest.raises(CollectiveMismatchError, match="rank 1 came to #0 hierarchical all_reduce"):
        run_over("shared memory within", Mesh.of(dp=1, tp=3), rank, checked=True, hosts=(0, 0, 1))


# --- faults, among processes


def launches(mesh: Mesh, *series: Series) -> tuple[Launch, Launch]:
    """Those of two nodes on this machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    first, second = (
        Launch.of_nodes(world_size=mesh.size, num_nodes=2, node=node, address="127.0.0.1", port=port)
        for node in range(2)
    )
    return (replace(first, series=series[0]), replace(second, series=series[1])) if series else (first, second)


@contextmanager
def two_nodes(mesh: Mesh, **more: object) -> Iterator[ProcessRanks[lab.Lab]]:
    """Ranks of a world on two nodes, both on this machine."""
    first, second = launches(mesh)
    ended: list[int] = []
    node = threading.Thread(target=lambda: ended.append(run_node(second)))
    node.start()
    try:
        with ProcessRanks(mesh, lab.Lab, launch=first, timing=QUICK, **more) as ranks:  # type: ignore[arg-type]
            assert ranks.transport.startswith(BOTH)
            yield ranks
    finally:
        node.join(PATIENCE_S)
    assert ended, "the other node did not end"


def failed(
    text: str, function: Callable[..., object], *args: object, before: Callable[..., None] | None = None
) -> None:
    """The call fails with an error that matches; ``before``: what happens to the ranks while they are in it."""
    with two_nodes(Mesh.of(dp=1, tp=3), timeout_s=600.0 if "within" not in text else 1.0) as ranks:
        call = ranks.submit(lab.Lab.run, function, *args)
        if before is not None:
            before(ranks)
        with pytest.raises(RankError) as caught:
            call.result(PATIENCE_S)
        assert re.search(text, without_calls(caught.value)), caught.value


def signalled(number: int) -> Callable[[ProcessRanks[lab.Lab]], None]:
    return lambda ranks: os.kill(ranks.pids[2], number)


def test_a_rank_that_dies_on_the_other_host_is_named() -> None:
    """Rank 2 is alone on its host."""
    kill = signalled(signal.SIGKILL)
    failed(r"^rank 2 \(pid \d+.*", lab.sum_late, 2, before=kill)


@pytest.mark.full
def test_a_rank_on_the_other_host_that_does_not_come_is_named() -> None:
    """Silent, late, or in no collective while the others are."""
    stop = signalled(signal.SIGSTOP)
    waits = r'rank 0 waits at #\d hierarchical all_reduce "layer 7 experts"'
    at_once(
        [
            lambda: failed(r"^rank 2 \(pid \d+ on .*nothing was heard", lab.sum_late, 2, before=stop),
            lambda: failed(r"^rank 2 did not come within 1 s; rank 0 waits at", lab.sum_late, 2),
            lambda: failed(rf"^rank 2 will not come; {waits}", lab.sum_without, 2),
        ]
    )


def test_a_node_serves_world_after_world_until_none_follows() -> None:
    """Also two at once: each has a port of its own."""
    mesh = Mesh.of(dp=1, tp=2)
    first, second = launches(mesh, Series(), Series())
    ended: list[int] = []
    node = threading.Thread(target=lambda: ended.append(run_series(second)))
    node.start()
    start = partial(ProcessRanks, mesh, lab.Lab)
    with start(launch=first.world()) as one, start(launch=first.world()) as two:
        assert not {*one.pids} & {*two.pids}
        for value, ranks in ((1.0, one), (5.0, two)):
            assert ranks.submit(lab.Lab.run, lab.sum_of, value).result(PATIENCE_S) == [2 * value + 1] * 2
    assert not ended, "another world may follow"
    announce_end(first)
    node.join(PATIENCE_S)
    assert ended == [0]


@pytest.mark.full
def test_a_calibration_over_two_nodes_is_used_there_alone(tmp_path: Path) -> None:
    """Both nodes on this machine: the flags, worlds one after the other, the tables, and whom the profile fits."""
    file, (first, _) = tmp_path / "two.json", launches(Mesh.of(dp=1, tp=2))
    work = ["--num-ranks", "2", "--quick", "--seconds", "5", "--dtype", "float32", "--out", str(file)]
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(first.port), "--node-rank"]
    command = [sys.executable, "-m", "narrows", "calibrate", "narrows-demo", *work, *where]
    nodes = [subprocess.Popen([*command, str(node)]) for node in (0, 1)]
    assert [node.wait(PATIENCE_S) for node in nodes] == [0, 0]
    profile = read_profile(file)
    assert (profile.fits.hosts, profile.fits.world) == (2, "shm+gloo")
    assert {each.nodes for each in profile.collectives} == {2}
    engine_config = EngineConfig(model="narrows-demo", tp=2, dtype="float32", ranks="processes", device=str(file))
    assert resolve(replace(engine_config, launch=first)).deployment.device.measured is not None
    with pytest.raises(ConfigError, match="hosts 2 there, 1 here"):
        resolve(engine_config)
