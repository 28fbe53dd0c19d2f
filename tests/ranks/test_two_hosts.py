"""The command line over two hosts: network namespaces of this machine, joined by a cable (tests/host_rig.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from host_rig import HostRig, NoRigError, why_none
from test_processes_cli import by_threads, ended, first_words, nodes

__all__ = ["by_threads"]

pytestmark = pytest.mark.skipif(bool(why_none()), reason=why_none())
PORT = 29511
LONG = ("--ignore-eos", "--max-tokens", "1500")


@pytest.fixture
def rig():
    """Makes a rig; the test is skipped where the kernel refuses it."""
    made: list[HostRig] = []

    def make(**more: float) -> HostRig:
        try:
            made.append(HostRig(**more).__enter__())
        except NoRigError as error:
            pytest.skip(f"no network namespaces here: {error}")
        return made[0]

    yield make
    for each in made:
        each.__exit__(None, None, None)


def test_two_hosts_print_the_same_as_threads(speaking_v3: Path, by_threads: str, rig: Callable[..., HostRig]) -> None:
    """Two ranks on each; also what one rank prints, since `by_threads` is that (test_processes_cli.py)."""
    hosts = rig()
    more = ("--dp", "2", "--tp", "2", "--checked")
    prefix = (hosts.on(0), hosts.on(1))
    coordinator, node = nodes(speaking_v3, hosts.addresses[0], PORT, *more, prefix=prefix)
    code, out, err = ended(coordinator)
    assert (code, out) == (0, by_threads), err
    assert ended(node)[:2] == (0, "")


def test_a_cut_cable_is_named_at_both_ends(speaking_v3: Path, rig: Callable[..., HostRig]) -> None:
    """As for a host that vanishes: no packet comes, and no word that none will."""
    hosts = rig()
    prefix = (hosts.on(0), hosts.on(1))
    coordinator, node = nodes(speaking_v3, hosts.addresses[0], PORT, "--tp", "2", *LONG, prefix=prefix)
    first_words(coordinator, 10)
    hosts.cut()
    code, _, err = ended(coordinator)
    assert code == 2
    assert re.search(r"narrows: error: rank 1 \(pid \d+ on .+\), node 1 .*: nothing was heard for 6 s", err), err
    code, _, err = ended(node)
    assert code == 2 and "node 1: the coordinator at 10.99.0.1 is gone" in err


@pytest.mark.full
def test_a_slow_cable_is_named(speaking_v3: Path, rig: Callable[..., HostRig]) -> None:
    """All ranks are in a collective, and their heartbeats come through, but it does not end."""
    hosts = rig(rate_mbit=0.5, mtu=1500)
    prefix = (hosts.on(0), hosts.on(1))
    long = " ".join(f"w{i % 60}" for i in range(900))
    more = ("--tp", "2", "--rank-timeout", "1", "--prompt", long)
    coordinator, node = nodes(speaking_v3, hosts.addresses[0], PORT, *more, prefix=prefix)
    code, _, err = ended(coordinator)
    assert code == 2
    assert re.search(r"ranks 0, 1 all came to #\d+ \w+ .* not done within 1 s: the network between", err), err
    assert ended(node)[0] == 2
