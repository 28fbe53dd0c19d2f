"""Faults of rank processes: each error names the rank and its collective, and no process is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ranks_lab as lab
from patience import FACTOR, PATIENCE_S, eventually

from narrows.errors import CollectiveMismatchError, RankError
from narrows.layout import Mesh
from narrows.ranks import ProcessRanks
from narrows.ranks.timing import Timing

ONE, TWO, THREE = (Mesh.of(dp=1, tp=n) for n in (1, 2, 3))
QUICK = Timing(
    beat_s=0.05,
    silence_s=1.5 * FACTOR,
    suspended_s=0.5 * FACTOR,
    stuck_s=0.3 * FACTOR,
    blame_s=0.5 * FACTOR,
    grace_s=0.2 * FACTOR,
)
"""A fraction of the durations that users have, and longer on a slower machine."""
Ranks = ProcessRanks[lab.Lab]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end_of(pids: Sequence[int]) -> None:
    eventually(lambda: not any(is_alive(pid) for pid in pids))


def without_calls(error: BaseException) -> str:
    """The message without the number of the call that each collective belongs to."""
    return re.sub(r" in call \d+", "", str(error))


def error_of(ranks: Ranks, *call: object) -> BaseException:
    """The error of a call. Every later call raises it too, and every rank has ended."""
    with pytest.raises(BaseException) as caught:
        ranks.submit(lab.Lab.run, *call).result(PATIENCE_S)
    for later in (ranks.submit(lab.Lab.tell, 1), ranks.submit(lab.Lab.run, lab.sum_of, 1.0)):
        assert later.exception(PATIENCE_S) is caught.value
    wait_for_the_end_of(ranks.pids)
    return caught.value


def at_once(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs jobs side by side."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        for future in [threads.submit(job) for job in jobs]:
            future.result()


# --- checked mode


@pytest.fixture(scope="module")
def checked() -> Iterator[Ranks]:
    with ProcessRanks(THREE, lab.Lab, checked=True, timing=QUICK) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("how", "odd", "others"),
    [
        ("label", 'all_reduce "layer 3 experts" [6 x 4', 'all_reduce "layer 3 input_norm" [6 x 4 float32] split 1+2+3'),
        ("operation", 'barrier "layer 3 input_norm"', 'all_reduce "layer 3 input_norm" [6 x 4 float32]'),
        ("width", "[6 x 6 float32]", "[6 x 4 float32]"),
        ("dtype", "[6 x 4 bfloat16]", "[6 x 4 float32]"),
        ("counts", "split 2+2+2", "split 1+2+3"),
        ("fields", "[6 x 4 float32]", "[6 x 4 float32, 6 x 4 float32]"),
        ("addends", "[6 x 4 float32, 6 x 4 float32, 6 x 4 float32]", "[6 x 4 float32, 6 x 4 float32] split"),
        ("root", "from rank 1", "from rank 0"),
        ("number", "all_reduce", "all_reduce"),
    ],
)
def test_a_mismatch_names_both_collectives(checked: Ranks, how: str, odd: str, others: str) -> None:
    """It is detected before any data is sent, so ranks that catch it can continue."""
    texts = checked.submit(lab.Lab.run, lab.differing, how).result(PATIENCE_S)
    assert texts == [texts[0]] * 3
    assert texts[0].startswith("ranks met in different collectives: rank 1 came to #")
    one, rest = texts[0].split(", ranks 0, 2 to #")
    assert odd in one and others in rest
    if how == "number":
        assert int(re.search(r"came to #(\d+)", one)[1]) == int(rest.split()[0]) + 1
        # Rank 1 is one ahead from now on, and no rank catches the error, so the call fails. The last test of this pool.
        error = error_of(checked, lab.in_different_labels)
        assert type(error) is CollectiveMismatchError
        assert 'barrier "layer 3 mlp"' in str(error) and "ranks 0, 2 to #" in str(error)
    else:
        assert checked.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S) == [6.0] * 3


# --- a rank that does not come


def skip(is_checked: bool) -> None:
    with ProcessRanks(TWO, lab.Lab, checked=is_checked, timeout_s=600, timing=QUICK) as ranks:
        error = error_of(ranks, lab.step_without, 1, "layer 7 experts")
        assert type(error) is RankError
        text = without_calls(error)
        assert text.startswith('rank 1 will not come; rank 0 waits at #2 all_reduce "layer 7 experts"')
        assert 'rank 1 last came to #1 barrier "start" of ranks 0, 1; rank 1 had ended that call' in text


def cross() -> None:
    """The field's commonest deadlock: one rank idle and one not."""
    with ProcessRanks(Mesh.of(dp=2, tp=2), lab.Lab, timeout_s=600, timing=QUICK) as ranks:
        text = without_calls(error_of(ranks, lab.in_different_groups))
        assert "rank 1 will not come" in text
        assert 'rank 0 waits at #0 barrier "attention sum"' in text
        assert 'rank 1 last came to #1 barrier "idle step" of ranks 0, 1, 2, 3' in text


def test_a_stuck_rank_is_named_before_the_timeout() -> None:
    """It has ended the call that others are in, or waits for them."""
    at_once([lambda: skip(False), cross])


@pytest.mark.full
def test_a_stuck_rank_is_named_in_checked_mode() -> None:
    skip(True)


def test_a_late_rank_is_named_after_the_timeout() -> None:
    timeout_s = 1.0 * FACTOR
    with ProcessRanks(TWO, lab.Lab, timeout_s=timeout_s, timing=QUICK) as ranks:
        assert ranks.submit(lab.Lab.run, lab.late, 1, 0.1).result(PATIENCE_S) == [None] * 2
        error = error_of(ranks, lab.late, 1, PATIENCE_S)
        assert type(error) is RankError
        assert without_calls(error) == (
            f'rank 1 did not come within {timeout_s:g} s; rank 0 waits at #2 barrier "layer 7 experts"; '
            'rank 1 last came to #1 barrier "layer 7 experts" of ranks 0, 1'
        )


# --- a rank that raises


def test_an_error_fails_its_call_and_later_ones() -> None:
    rank = 0
    with ProcessRanks(TWO, lab.Lab, timing=replace(QUICK, grace_s=PATIENCE_S)) as ranks:
        before = ranks.submit(lab.Lab.tell, 7, 0.3)  # rank 1 is still in it when rank 0 fails
        bad = ranks.submit(lab.Lab.run, lab.fail, rank, ArithmeticError("worker broke"))
        after = ranks.submit(lab.Lab.run, lab.sum_of, 2.0)
        with pytest.raises(ArithmeticError, match="worker broke") as caught:
            bad.result(PATIENCE_S)
        assert before.result(PATIENCE_S) == [7, 107]
        assert str(caught.value) == "worker broke"
        notes = "\n".join(caught.value.__notes__)
        assert f"rank {rank} (pid {ranks.pids[rank]} on " in notes and "in fail\n" in notes, "the rank's own traceback"
        for future in (after, ranks.submit(lab.Lab.run, lab.sum_of, 3.0)):
            assert future.exception(PATIENCE_S) is caught.value
        wait_for_the_end_of(ranks.pids)


def test_an_error_that_cannot_be_pickled_becomes_a_rank_error() -> None:
    with ProcessRanks(ONE, lab.Lab, timing=QUICK) as ranks:
        error = error_of(ranks, lab.fail, 0, "odd")
        assert type(error) is RankError
        assert re.fullmatch(r"rank 0 \(pid \d+ on .+\) failed: OddError: 1 and 2", str(error))


def test_a_result_that_cannot_be_pickled_fails_the_call() -> None:
    with ProcessRanks(ONE, lab.Lab, timing=QUICK) as ranks:
        assert "pickle" in str(error_of(ranks, lab.cannot_be_sent))


def cannot_be_built() -> None:
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        ProcessRanks(TWO, lab.Broken, timeout_s=600, timing=QUICK)


def ends_while_built() -> None:
    with pytest.raises(RankError, match=r"rank 1 \(pid \d+ on .+\) ended with exit code 7"):
        ProcessRanks(TWO, lab.Dead, timeout_s=600, timing=QUICK)


def test_errors_while_workers_are_built() -> None:
    at_once([cannot_be_built, ends_while_built])


# --- a rank that is gone


def kill(rank: int, rows: int, begun: Path) -> None:
    with ProcessRanks(TWO, lab.Lab, timing=QUICK) as ranks:
        future = lab.start_spinning(ranks, rows, str(begun))
        os.kill(ranks.pids[rank], signal.SIGKILL)
        with pytest.raises(RankError) as caught:
            future.result(PATIENCE_S)
        text = str(caught.value)
        assert text.startswith(f"rank {rank} (pid {ranks.pids[rank]} on ")
        assert "was killed by signal 9 (SIGKILL)" in text
        assert re.search(rf"rank [^{rank}] \(pid \d+ on .+\) was at #\d+ all_reduce \"sum\"", text)
        wait_for_the_end_of(ranks.pids)


@pytest.mark.parametrize(("rank", "rows"), [(1, 4000), pytest.param(0, 1, marks=pytest.mark.full)])
def test_a_killed_rank_is_named(tmp_path: Path, rank: int, rows: int) -> None:
    """Also in the middle of a large copy; the error names the others' calls."""
    kill(rank, rows, tmp_path / "begun")


def test_a_killed_rank_is_named_over_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWS_NATIVE", "0")
    kill(1, 1, tmp_path / "begun")


def test_an_idle_rank_that_dies_fails_the_next_call() -> None:
    with ProcessRanks(ONE, lab.Lab, timing=QUICK) as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        wait_for_the_end_of(ranks.pids)
        with pytest.raises(RankError, match=r"rank 0 .* was killed by signal 9"):
            ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S)


# --- the coordinator

PROGRAM = """
    import select, sys, time
    sys.path.insert(0, sys.argv[1])
    import ranks_lab as lab
    from narrows.ranks import ProcessRanks
    from narrows.ranks.timing import Timing
    from narrows.layout import Mesh

    ranks = ProcessRanks(Mesh.of(dp=1, tp={num}), lab.Lab, timeout_s=600, timing=Timing(**{timing}))
    {first}
    print(*ranks.pids, flush=True)
    {then}
"""
SPIN = "work = lab.start_spinning(ranks, 1, sys.argv[2])"
UNTIL_STDIN_ENDS = (
    "while not select.select([sys.stdin], [], [], 0)[0]: ranks.submit(lab.Lab.run, lab.late, 0, 0.01).result()"
)


def start_coordinator(num: int, begun: Path, *, first: str = "", then: str) -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).format(num=num, timing=asdict(QUICK), first=first, then=then)
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(begun)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def pids_of(coordinator: subprocess.Popen[str]) -> list[int]:
    assert coordinator.stdout is not None
    return [int(pid) for pid in coordinator.stdout.readline().split()]


def has_children(process: subprocess.Popen[str]) -> bool:
    return any(path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children"))


def ends_well(coordinator: subprocess.Popen[str], pids: Sequence[int]) -> None:
    """The coordinator ends once its stdin has ended, and its ranks with it; it prints no error."""
    assert coordinator.stdin is not None and coordinator.stderr is not None
    coordinator.stdin.close()
    assert coordinator.wait(PATIENCE_S) == 0
    assert coordinator.stderr.read() == ""
    wait_for_the_end_of(pids)


def test_ranks_end_when_their_coordinator_is_killed(tmp_path: Path) -> None:
    """At work, idle, and while they start. No rank of the last has a pid here yet: the fixture looks for it."""
    at_work = start_coordinator(2, tmp_path / "begun", first=SPIN, then="work.result()")
    idle, early = (start_coordinator(1, tmp_path / "unused", then="time.sleep(3600)") for _ in range(2))
    with at_work, idle, early:
        eventually(lambda: has_children(early))
        early.kill()
        for coordinator in (at_work, idle):
            pids = pids_of(coordinator)
            assert pids and all(is_alive(pid) for pid in pids)
            coordinator.kill()
            wait_for_the_end_of(pids)
            assert coordinator.stderr is not None and coordinator.stderr.read() == ""


def test_ranks_that_are_never_closed_end(tmp_path: Path) -> None:
    """When their owner drops the last reference, and when the process ends while they work."""
    drops = start_coordinator(1, tmp_path / "unused", then="del ranks; sys.stdin.read()")
    ends = start_coordinator(2, tmp_path / "begun", first=SPIN, then="pass")
    with drops, ends:
        pids = pids_of(drops)
        wait_for_the_end_of(pids)
        assert drops.poll() is None
        ends_well(drops, pids)
        ends_well(ends, pids_of(ends))


# --- processes that are stopped


def stop(rank: int, rows: int, begun: Path) -> None:
    with ProcessRanks(TWO, lab.Lab, timeout_s=600, timing=QUICK) as ranks:
        future = lab.start_spinning(ranks, rows, str(begun))
        os.kill(ranks.pids[rank], signal.SIGSTOP)
        with pytest.raises(RankError) as caught:
            future.result(PATIENCE_S)
        assert f"rank {rank} (pid {ranks.pids[rank]} on " in str(caught.value)
        assert f"is stopped: nothing was heard for {QUICK.silence_s:g} s" in str(caught.value)
        assert re.search(rf'rank {1 - rank} waits at #\d+ all_reduce "sum"', str(caught.value))
        wait_for_the_end_of(ranks.pids)


def suspend_all() -> None:
    """Ctrl-Z, and `fg` after more than ``silence_s``."""
    with start_coordinator(2, Path(), then=UNTIL_STDIN_ENDS) as coordinator:
        pids = pids_of(coordinator)
        group = os.getpgid(coordinator.pid)
        assert {os.getpgid(pid) for pid in pids} == {group}
        os.killpg(group, signal.SIGSTOP)
        time.sleep(1.25 * QUICK.silence_s)
        assert all(is_alive(pid) for pid in [coordinator.pid, *pids])
        for pid in [*pids, coordinator.pid]:
            os.kill(pid, signal.SIGCONT)
        ends_well(coordinator, pids)


def suspend_coordinator() -> None:
    """As under one C call that keeps the interpreter's lock for more than ``silence_s``."""
    with start_coordinator(1, Path(), then=UNTIL_STDIN_ENDS) as coordinator:
        pids = pids_of(coordinator)
        os.kill(coordinator.pid, signal.SIGSTOP)
        try:
            time.sleep(1.25 * QUICK.silence_s)
            assert all(is_alive(pid) for pid in pids)
        finally:
            os.kill(coordinator.pid, signal.SIGCONT)
        ends_well(coordinator, pids)


def test_stopped_processes(tmp_path: Path) -> None:
    """A stopped rank is named and killed; a stopped coordinator continues, with or without its ranks."""
    at_once([lambda: stop(1, 4000, tmp_path / "begun"), suspend_all, suspend_coordinator])


@pytest.mark.full
def test_a_stopped_rank_0_is_named(tmp_path: Path) -> None:
    stop(0, 1, tmp_path / "begun")
