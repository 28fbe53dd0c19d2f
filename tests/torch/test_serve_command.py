"""What `narrows serve` makes of its flags before the engine starts."""

from __future__ import annotations

import argparse

import pytest

from narrows.cli import serve_command
from narrows.ranks import Launch

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}


def test_ranks_of_other_processes_are_not_restarted_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    serve_command.add_parser(parser)
    plain, without = parser.parse_args(["MODEL"]), parser.parse_args(["MODEL", "--no-restart"])
    nodes = Launch.of_nodes(world_size=4, num_nodes=2, node=0, address="10.0.0.1", port=1)
    by_torchrun = Launch.of_torchrun(TORCHRUN, world_size=None)
    assert serve_command._may_restart(plain, None)
    assert not any(serve_command._may_restart(without, launch) for launch in (None, nodes, by_torchrun))
    assert not caplog.messages, "that was asked for"
    for launch, by in ((nodes, "--nnodes"), (by_torchrun, "torchrun")):
        assert not serve_command._may_restart(plain, launch)
        said = f"ranks started by {by} are not restarted: if one dies, the server ends"
        assert caplog.messages[-1].startswith(said)
        caplog.clear()
    assert "always so with --nnodes or torchrun" in " ".join(parser.format_help().split())
