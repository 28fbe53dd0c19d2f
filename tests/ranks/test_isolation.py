"""Runs on one machine do not see each other: not their shared memory, and not each other's test processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks_lab as lab
from patience import PATIENCE_S

from narrows.comm.shm_calls import functions
from narrows.layout import Mesh
from narrows.native import why_absent
from narrows.ranks import ProcessRanks

TWO = Mesh.of(dp=1, tp=2)


@pytest.fixture(scope="module")
def two_runs() -> Iterator[list[ProcessRanks[lab.Lab]]]:
    with ThreadPoolExecutor(2) as threads:
        runs = [future.result() for future in [threads.submit(ProcessRanks, TWO, lab.Lab) for _ in range(2)]]
    with runs[0], runs[1]:
        yield runs


def mapped(pid: int, path: str) -> set[str]:
    """The inodes that a process maps under ``path``."""
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line[4] for line in lines if len(line) == 6 and line[5].startswith(path)}


def test_runs_at_once_get_their_own_sums(two_runs: list[ProcessRanks[lab.Lab]]) -> None:
    sums = [run.submit(lab.Lab.run, lab.sum_of, value) for value in (1.0, 100.0) for run in two_runs]
    assert [sums.result(PATIENCE_S) for sums in sums] == [[3.0] * 2] * 2 + [[201.0] * 2] * 2


@pytest.mark.skipif(functions() is None, reason=f"no compiled code: {why_absent()}")
def test_shared_memory_has_no_name_and_belongs_to_one_run(two_runs: list[ProcessRanks[lab.Lab]]) -> None:
    for run in two_runs:
        run.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S)
    first, second = ([mapped(pid, "/memfd:narrows") for pid in run.pids] for run in two_runs)
    assert first[0] == first[1] and len(first[0]) == 2, "a segment of each rank"
    assert second[0] == second[1] and len(second[0]) == 2
    assert not first[0] & second[0]
    for pid in [pid for run in two_runs for pid in run.pids]:
        assert not mapped(pid, "/dev/shm/")
        opened = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        assert not [path for path in opened if path.startswith("/dev/shm/")]


def test_processes_of_another_test_run_are_not_counted(running: Callable[[], set[int]]) -> None:
    program = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    before = running()
    started = [
        subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | env)
        for env in ({}, {"NARROWS_TEST_RUN": "another"})
    ]
    with started[0] as ours, started[1] as theirs:
        for process in (ours, theirs):
            assert process.stdout is not None and process.stdout.readline()
        assert running() - before == {ours.pid}
        for process in (ours, theirs):
            process.communicate()
