"""Rank processes that are copies of the coordinator: the same results, named faults, and nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
from patience import PATIENCE_S
from test_processes_faults import QUICK, is_alive, pids_of, wait_for_the_end_of

BEGIN = """
    import json, os, sys, threading
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import ranks_lab as lab
    from narrows.errors import ConfigError, RankError
    from narrows.layout import Mesh
    from narrows.ranks import Launch, ProcessRanks
    from narrows.ranks.copies import can_copy
    from narrows.ranks.timing import Timing

    TWO = Mesh.of(dp=1, tp=2)
    def started(make=lab.Lab, **more):
        return ProcessRanks(TWO, make, timeout_s=600, timing=Timing(**{timing}), copies=True, **more)
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


def test_copies_compute_and_are_ranks_in_every_other_way() -> None:
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
def test_faults_of_copies_are_named_and_end_all_ranks(then: str, error: str) -> None:
    program = f"""
        try:
            {then}
        except (RankError, FileNotFoundError) as error:
            assert {error!r} in str(error), error
            print("named")
    """
    assert said(program) == "named\n"


def test_copies_that_are_not_told_what_to_do_end() -> None:
    """A port that is taken is known when the copies are there already."""
    program = """
        import socket
        taken = socket.create_server(("127.0.0.1", 0))
        launch = Launch(
            address="127.0.0.1", port=taken.getsockname()[1], world_size=2, ranks=(0, 1), node=0, num_nodes=1
        )
        assert can_copy()
        try:
            started(launch=launch)
        except ConfigError as error:
            assert "cannot listen on 127.0.0.1" in str(error), error
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        assert not children, children
        print("ended")
    """
    assert said(program) == "ended\n"


def test_a_process_with_another_thread_is_not_copied() -> None:
    program = """
        sys.argv.append("of the coordinator")
        over = threading.Event()
        threading.Thread(target=over.wait).start()
        assert not can_copy()
        with started() as ranks:
            facts = ranks.submit(lab.Lab.run, lab.facts).result()
        over.set()
        print(*(fact[-1] for fact in facts), sep=", ")
    """
    assert said(program) == "narrows rank 0, narrows rank 1\n"


def test_copies_end_when_their_coordinator_is_killed(tmp_path: Path) -> None:
    """At work, and while they wait for what to do."""
    work = "ranks = started(); work = lab.start_spinning(ranks, 1, sys.argv[2]); print(*ranks.pids, flush=True)"
    at_work = python(f"{work}; work.result()", str(tmp_path / "begun"))
    wait = "started(meanwhile=lambda: (print(flush=True), threading.Event().wait()))"
    waiting = python(wait)
    with at_work, waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == "\n"
        (task,) = Path(f"/proc/{waiting.pid}/task").iterdir()
        early = [int(pid) for pid in (task / "children").read_text().split()]
        assert len(early) == 2
        pids = pids_of(at_work)
        assert len(pids) == 2 and all(is_alive(pid) for pid in (*pids, *early))
        for coordinator in (at_work, waiting):
            coordinator.kill()
        wait_for_the_end_of([*pids, *early])
        assert at_work.stderr is not None and at_work.stderr.read() == ""


def test_a_command_copies_itself_and_says_where_its_start_went() -> None:
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
