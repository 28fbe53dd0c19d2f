"""Rank processes that a fork server makes: the same results, named faults, and nothing left behind."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import ranks_lab as lab
from patience import PATIENCE_S, eventually
from processes_lab import parent_of, rank_pids
from test_processes_faults import QUICK, is_alive, pids_of, wait_for_the_end_of

from narrows.errors import RankError
from narrows.layout import Mesh
from narrows.ranks import ProcessRanks
from narrows.ranks.fork_server import ForkServer, fork_server

BEGIN = """
    import json, os, sys, threading
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import ranks_lab as lab
    from narrows.errors import ConfigError, RankError
    from narrows.layout import Mesh
    from narrows.ranks import Launch, ProcessRanks
    from narrows.ranks.fork_server import fork_server, has_one_thread
    from narrows.ranks.timing import Timing

    TWO = Mesh.of(dp=1, tp=2)
    def started(make=lab.Lab, **more):
        return ProcessRanks(TWO, make, timeout_s=600, timing=Timing(**{timing}), fork_self=True, **more)
"""


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A process with a single thread, until it starts one."""
    code = textwrap.dedent(BEGIN).replace("{timing}", str(asdict(QUICK))) + textwrap.dedent(program)
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *arguments]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def said(program: str, *arguments: str) -> str:
    with python(program, *arguments) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (0, "")
    return out


def test_forks_of_the_coordinator_compute_and_are_ranks_in_every_other_way() -> None:
    """They see what the coordinator has imported and set, and print nothing that it has not printed yet."""
    program = """
        sys.argv.append("of the coordinator")
        print("once")
        with started() as ranks:
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in ranks.pids]
            assert names == ["narrows rank 0", "narrows rank 1"], names
            assert ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result() == [3.0, 3.0]
            facts = ranks.submit(lab.Lab.run, lab.facts).result()
        assert facts == [(r, pid, 1, True, True, True, "of the coordinator") for r, pid in enumerate(ranks.pids)], facts
    """
    assert said(program) == "once\n"


@pytest.mark.parametrize(
    ("then", "error"),
    [
        ("with started() as ranks: ranks.submit(lab.Lab.run, lab.die, 1).result()", "rank 1 (pid"),
        ("started(lab.Broken)", "model-00002-of-00002.safetensors"),
        ("started(lab.Dead)", "ended with exit code 7"),
    ],
    ids=["killed", "raises", "ends"],
)
def test_faults_of_forks_are_named_and_end_all_ranks(then: str, error: str) -> None:
    program = f"""
        try:
            {then}
        except (RankError, FileNotFoundError) as error:
            assert {error!r} in str(error), error
            print("named")
    """
    assert said(program) == "named\n"


def test_forks_that_are_not_told_what_to_do_end() -> None:
    """A port that is taken is known when the forks are there already."""
    program = """
        import socket
        taken = socket.create_server(("127.0.0.1", 0))
        launch = Launch(
            address="127.0.0.1", port=taken.getsockname()[1], world_size=2, ranks=(0, 1), node=0, num_nodes=1
        )
        assert has_one_thread()
        try:
            started(launch=launch)
        except ConfigError as error:
            assert "cannot listen on 127.0.0.1" in str(error), error
        assert not fork_server().has_ranks
        print("ended")
    """
    assert said(program) == "ended\n"


def test_a_process_with_another_thread_is_not_forked() -> None:
    program = """
        sys.argv.append("of the coordinator")
        over = threading.Event()
        threading.Thread(target=over.wait).start()
        assert not has_one_thread()
        with started() as ranks:
            facts = ranks.submit(lab.Lab.run, lab.facts).result()
        over.set()
        print(*(fact[-1] for fact in facts), sep=", ")
    """
    assert said(program) == "narrows forks, narrows forks\n"


def test_forks_end_when_their_coordinator_is_killed(tmp_path: Path) -> None:
    """At work, and while they wait for what to do."""
    work = "ranks = started(); work = lab.start_spinning(ranks, 1, sys.argv[2]); print(*ranks.pids, flush=True)"
    at_work = python(f"{work}; work.result()", str(tmp_path / "begun"))
    wait = "started(meanwhile=lambda: (print(flush=True), threading.Event().wait()))"
    waiting = python(wait)
    with at_work, waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == "\n"
        eventually(lambda: len(rank_pids(waiting.pid)) == 2)  # a fork is there before it has its name
        early = rank_pids(waiting.pid)
        pids = pids_of(at_work)
        assert len(pids) == 2 and all(is_alive(pid) for pid in (*pids, *early))
        for coordinator in (at_work, waiting):
            coordinator.kill()
        wait_for_the_end_of([*pids, *early])
        assert at_work.stderr is not None and at_work.stderr.read() == ""


def test_forks_end_in_silence_when_their_coordinator_had_not_read_of_an_end() -> None:
    """The system resets a connection whose reader has ended with messages unread, which is no fault of the forks."""
    with python("ranks = started(); print(*ranks.pids, flush=True); threading.Event().wait()") as coordinator:
        first, second = pids_of(coordinator)
        coordinator.send_signal(signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{first}").exists())  # the fork server has met its end, and reports it
        coordinator.kill()
        wait_for_the_end_of([second])
        assert coordinator.stderr is not None and coordinator.stderr.read() == ""


def test_a_fork_server_that_ended_with_a_request_unread_is_replaced() -> None:
    """The same from the other side."""
    program = """
        import fcntl, signal, termios
        failed = []
        def refused(server):
            try:
                server.fork(["narrows rank 0"])
            except RankError as error:
                failed.append(str(error))
        one = fork_server()
        os.kill(one.pid, signal.SIGSTOP)
        asking = threading.Thread(target=refused, args=[one])
        asking.start()
        while not any(fcntl.ioctl(one._link, termios.TIOCOUTQ, bytes(4))):
            pass  # the request is not under way yet
        os.kill(one.pid, signal.SIGKILL)
        asking.join()
        assert f"(pid {one.pid}) does not answer: it has ended" in failed[0], failed
        assert not one.fits() and fork_server() is not one
    """
    assert said(program) == ""


def test_a_command_forks_itself_and_says_where_its_start_went() -> None:
    """It has no other way here: there is no interpreter to start."""
    code = "import sys; sys.executable = '/nowhere/python'; from narrows.cli.main import main; sys.exit(main())"
    sums = ("--chat", "--max-tokens", "4", "--prompt", "What is 47 + 38?")
    command = [sys.executable, "-c", code, "generate", "narrows-demo", "--tp", "2", "--ranks", "processes", "--profile"]
    done = subprocess.run([*command, *sums], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "\n85\n" in done.stdout
    phases = re.findall(r"^ +([a-z][a-z ,:]+?) +\d+\.\d{3} +\d+\.\d", done.stderr, re.MULTILINE)
    assert phases == [
        "interpreter and imports",
        "config, memory and plan",
        "tokenizer",
        "rank processes",
        "weights on the ranks",
        "slowest rank: meeting the other ranks",
        "slowest rank: reading and packing",
        "first token",
    ]


# --- the fork server of a process that lives on


ONE = Mesh.of(dp=1, tp=1)


def one_rank() -> ProcessRanks[lab.Lab]:
    return ProcessRanks(ONE, lab.Lab, timeout_s=600, timing=QUICK)


def test_one_fork_server_makes_the_ranks_of_every_start() -> None:
    server = fork_server()
    assert server is not None
    for _ in range(2):
        with one_rank() as ranks:
            assert parent_of(*ranks.pids) == server.pid == fork_server().pid  # type: ignore[union-attr]
            assert server.has_ranks
        assert not server.has_ranks


def test_ranks_have_the_environment_the_folder_and_the_cores_of_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, cores = fork_server(), os.sched_getaffinity(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THIS_TEST", "set")
    monkeypatch.delenv("HOME")
    os.sched_setaffinity(0, {max(cores)})
    try:
        with one_rank() as ranks:
            found = ranks.submit(lab.Lab.run, lab.surroundings, ("OF_THIS_TEST", "HOME")).result()
    finally:
        os.sched_setaffinity(0, cores)
    assert found == [(str(tmp_path), ("set", None), (max(cores),))]
    assert fork_server() is server


def test_a_variable_that_libraries_read_once_takes_another_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one lives as long as its ranks do."""
    before = fork_server()
    with one_rank() as ranks:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        with one_rank() as others:
            after = fork_server()
            assert after is not before and parent_of(*others.pids) == after.pid  # type: ignore[union-attr]
        assert ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result() == [1.0]
        os.kill(*ranks.pids, signal.SIGKILL)
        with pytest.raises(RankError, match="SIGKILL"):
            ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S)


def test_ranks_outlive_a_fork_server_that_is_killed() -> None:
    server = fork_server()
    assert server is not None
    with one_rank() as ranks:
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: not server.fits())
        assert ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result() == [1.0]
        with one_rank() as others:
            assert others.submit(lab.Lab.run, lab.sum_of, 1.0).result() == [1.0]
        os.kill(*ranks.pids, signal.SIGKILL)
        with pytest.raises(RankError, match="so its exit code is not known"):
            ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S)


def test_a_fork_server_that_does_not_answer_is_named() -> None:
    server = fork_server()
    assert server is not None
    server._link.settimeout(0.05)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RankError, match=rf"the process that forks ranks \(pid {server.pid}\) does not answer"):
            one_rank()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    with one_rank() as ranks:
        assert parent_of(*ranks.pids) != server.pid


def test_closing_ends_the_fork_server_and_again_does_nothing() -> None:
    server = ForkServer(fork_self=False)
    assert server.fits()
    server.close()
    server.close()
    assert not server.fits() and not is_alive(server.pid)


def refused(pid: int, flags: int = 0) -> int:
    raise PermissionError(errno.EPERM, "as a container may")


@pytest.mark.parametrize("has", [False, True])
def test_without_pidfd_ranks_are_new_interpreters(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has:
        monkeypatch.setattr(os, "pidfd_open", refused)
    else:
        monkeypatch.delattr(os, "pidfd_open")
    assert fork_server() is None
    with one_rank() as ranks:
        assert parent_of(*ranks.pids) == os.getpid()
        assert ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result() == [1.0]


def test_an_output_that_is_closed_is_nowhere() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.close(1)\n"
        "from test_fork_server import *\n"
        "with one_rank() as ranks: print(*ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "1.0\n")
