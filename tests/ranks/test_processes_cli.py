"""The command line over rank processes: on this host, under torchrun, and as two nodes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from patience import PATIENCE_S
from processes_lab import rank_pids
from torch.distributed import HashStore, PrefixStore

from narrows.cli.main import main
from narrows.errors import ConfigError
from narrows.ranks import Launch
from narrows.ranks.launch import coordinator_key, publish
from narrows.ranks.messages import Contact

Process = subprocess.Popen[str]
FIRST_OF_TWO = ("--nnodes", "2", "--node-rank", "0", "--master-port", "9")
PROMPTS = ["--prompt", "w1 w2 w3", "--prompt", "w9"]


def generate(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "narrows", "generate", str(folder), *PROMPTS, "--max-tokens", "8", *more]


def start(command: Sequence[str], **environment: str) -> Process:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | environment,
    )


def ended(process: Process) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, out, err


def first_words(process: Process, count: int) -> str:
    """Waits until it has written this many characters."""
    assert process.stdout is not None
    return process.stdout.read(count)


@pytest.fixture(scope="module")
def by_threads(speaking_v3: Path) -> str:
    """The printed text; in float32 it does not depend on the mesh."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(generate(speaking_v3, "--dp", "2", "--tp", "2", "--quiet")[3:]) == 0
    return out.getvalue()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# --- one host


def test_processes_print_the_same_as_threads(
    speaking_v3: Path, by_threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = generate(speaking_v3, "--dp", "2", "--quiet", "--ranks", "processes", "--checked")
    assert main(command[3:]) == 0
    assert tuple(capsys.readouterr()) == (by_threads, "")
    assert len(by_threads.split()) == 16


def test_torchrun_starts_the_ranks(speaking_v3: Path, by_threads: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = generate(speaking_v3, "--tp", "2", "--quiet")[2:]
    code, out, err = ended(start(torchrun + command))
    assert (code, out) == (0, by_threads), err


LONG = ("--quiet", "--ranks", "processes", "--ignore-eos", "--max-tokens", "1500", *(20 * PROMPTS))
"""Many texts as long as the context, one after the other: they outlast the test's own work."""
ONE_BY_ONE = ("--requests-per-group", "1")


def test_a_killed_rank_ends_the_command_with_one_line(speaking_v3: Path) -> None:
    long = ("--tp", "1", *LONG, *ONE_BY_ONE)
    process = start(generate(speaking_v3, *long))
    first_words(process, 20)
    (rank,) = rank_pids(process.pid)
    os.kill(rank, signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 2
    assert re.fullmatch(rf"narrows: error: rank 0 \(pid {rank} on .+\) was killed by signal 9 .*\n", err), err


def test_ctrl_c_ends_everything_once(speaking_v3: Path) -> None:
    process = start(generate(speaking_v3, "--tp", "2", *LONG, *ONE_BY_ONE))
    first_words(process, 20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, _, err = ended(process)
    assert (code, err) == (130, "narrows: interrupted\n")


def test_verify_compares_logits_over_processes(speaking_v3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tp", "2", "--ranks", "processes", "--layout", "auto", "--steps", "2", "--prompt", "w1 w2 w3 w4"]
    assert main(["verify", str(speaking_v3), *flags]) == 0
    out = capsys.readouterr().out
    assert "ranks as processes: logits alone were compared" in out
    assert "served path: op by op: no compiled code for float32 here" in out
    assert re.search(r"auto .* 100\.00 % .* ok", out)


def test_bench_compares_collectives_with_gloo_and_threads(
    speaking_v3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tp", "2", "--ranks", "processes", "--sizes", "2K", "--rounds", "1", "--against", "gloo")
    assert main(["bench", "collectives", str(speaking_v3), *flags, "--against", "threads", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["work"] for result in results] == [
        f"{op}, 2 KiB" for op in ("all_reduce", "reduce_scatter", "all_gather")
    ]
    assert all(list(r["variants"]) == ["ranks as processes", "ranks as threads", "gloo"] for r in results)


@pytest.mark.full
def test_ctrl_c_ends_a_bench_once(speaking_v3: Path) -> None:
    work = ("--num-requests", "4", "--input-length", "100", "--output-length", "1000", "--rounds", "1000")
    flags = ("--tp", "2", "--ranks", "processes", *work)
    process = start([sys.executable, "-m", "narrows", "bench", "offline", str(speaking_v3), *flags])
    assert process.stderr is not None
    assert process.stderr.readline() == "... warm-up: auto\n"
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out, err) == (130, "", "narrows: interrupted\n")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1"), "needs --master-addr and --master-port"),
        (("--nnodes", "3", "--node-rank", "0"), "--nnodes is 3; it must be between 1 and the 2 ranks"),
        (("--nnodes", "2", "--node-rank", "2"), "--node-rank must be between 0 and 1"),
        (("--nnodes", "2"), "--node-rank must be between 0 and 1"),
        (("--master-port", "1"), "--master-port needs --nnodes"),
        (("--rank-timeout", "0"), "--rank-timeout is 0 s; it must be more than 0"),
        ((*FIRST_OF_TWO, "--master-addr", "127.0.0.1", "--ranks", "threads"), "leave out --ranks threads"),
        ((*FIRST_OF_TWO, "--master-addr", "203.0.113.1"), "is it this host's?"),
    ],
)
def test_wrong_flags_are_refused(
    speaking_v3: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], text: str
) -> None:
    code = main(["generate", str(speaking_v3), "--tp", "2", "--prompt", "w1", *flags])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("narrows: error: ") and text in said and said.count("\n") == 1


# --- whose part is whose


def test_a_launch_is_read_from_torchruns_environment() -> None:
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "abc",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    launch = Launch.of_torchrun(environment, world_size=8)
    assert launch == Launch(
        address="10.0.0.1",
        port=29400,
        world_size=8,
        ranks=(5,),
        node=1,
        num_nodes=2,
        local_rank=1,
        local_world_size=4,
        by_torchrun=True,
        store_is_served=True,
        run="abc 2",
    )
    assert not launch.is_coordinator
    assert Launch.of_torchrun(environment | {"RANK": "0"}, world_size=8).is_coordinator
    assert Launch.of_torchrun({"RANK": "0", "WORLD_SIZE": "4"}, world_size=8) is None, "another tool's variables"
    with pytest.raises(ConfigError, match=r"torchrun started 8 processes, but the mesh has 4 ranks"):
        Launch.of_torchrun(environment, world_size=4)


def test_ranks_are_assigned_to_nodes_in_order() -> None:
    dealt = [
        Launch.of_nodes(world_size=5, num_nodes=2, node=node, address="10.0.0.1", port=1).ranks for node in range(2)
    ]
    assert dealt == [(0, 1, 2), (3, 4)]


def test_a_users_own_key_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the store could be read by any host that reaches it, which could then send the coordinator pickles."""
    launch = Launch.of_nodes(world_size=2, num_nodes=2, node=0, address="127.0.0.1", port=9)
    published = []
    for own in (None, "sesame", "sesame"):
        if own is not None:
            monkeypatch.setenv("NARROWS_KEY", own)
        store = HashStore()
        contact = Contact(address="127.0.0.1", port=5, key=coordinator_key())
        publish(launch, store, contact)
        said = json.loads(PrefixStore("narrows ", store).get("coordinator"))
        assert (said["address"], said["port"]) == ("127.0.0.1", 5)
        published.append((said["key"], contact.key))
    (shown, random), (hidden, own), (again, same) = published
    assert shown == random.hex() and hidden == again == "" and own == same != random and len(own) == 32


# --- several nodes


def nodes(
    folder: Path, address: str, port: int, *more: str, prefix: Sequence[Sequence[str]] = ((), ())
) -> list[Process]:
    """Both nodes of a command, node 1 first: it waits for the coordinator."""
    flags = ["--nnodes", "2", "--master-addr", address, "--master-port", str(port), "--quiet", *more]
    started = [start([*prefix[node], *generate(folder, *flags), "--node-rank", str(node)]) for node in (1, 0)]
    return started[::-1]


def test_nodes_end_with_the_coordinators_exit_code(speaking_v3: Path) -> None:
    """An error that only the coordinator can see, since it alone reads prompts."""
    coordinator, node = nodes(speaking_v3, "127.0.0.1", free_port(), "--tp", "2", "--max-context", "2")
    code, out, err = ended(coordinator)
    assert (code, out) == (2, "") and "the prompt has 3 tokens" in err
    code, out, err = ended(node)
    assert (code, out) == (2, "")
    assert (
        err.startswith("narrows: node 1 was ended by its coordinator: the prompt has 3 tokens") and err.count("\n") == 1
    )


@pytest.mark.full
def test_torchrun_ranks_end_with_the_coordinators_exit_code(speaking_v3: Path) -> None:
    """Without torchrun's agent, which would serve the store and replace the exit codes by its own."""
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = generate(speaking_v3, "--tp", "2", "--max-context", "2")
    coordinator, rank = (start(command, RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1))
    code, out, err = ended(coordinator)
    assert (code, out) == (2, "") and "the prompt has 3 tokens" in err
    code, out, err = ended(rank)
    assert (code, out) == (2, "") and err.startswith("narrows: the prompt has 3 tokens") and err.count("\n") == 1


def test_a_node_ends_when_its_coordinator_dies(speaking_v3: Path) -> None:
    coordinator, node = nodes(
        speaking_v3, "127.0.0.1", free_port(), "--tp", "2", "--ignore-eos", "--max-tokens", "1500"
    )
    first_words(coordinator, 10)
    coordinator.kill()
    code, out, err = ended(node)
    assert (code, out) == (2, "") and "narrows: error: node 1: the coordinator at 127.0.0.1 is gone" in err
    ended(coordinator)
