"""What goes wrong between rank processes is named, with ranks and labels, within seconds; then nothing is left."""

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
from pathlib import Path

import pytest
import ranks_lab as lab
from patience import PATIENCE_S, eventually

from narrows.errors import CollectiveMismatchError, RankError
from narrows.layout import Mesh
from narrows.ranks import ProcessRanks

ONE, TWO, THREE = (Mesh.of(dp=1, tp=n) for n in (1, 2, 3))
Ranks = ProcessRanks[lab.Lab]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end_of(pids: Sequence[int]) -> None:
    eventually(lambda: not any(is_alive(pid) for pid in pids))


def without_calls(error: BaseException) -> str:
    """What it says, without the number of the call that each collective belongs to."""
    return re.sub(r" in call \d+", "", str(error))


def error_of(ranks: Ranks, *call: object) -> BaseException:
    """What a call raises; every later call raises it too, and every rank has ended."""
    with pytest.raises(BaseException) as told:
        ranks.submit(lab.Lab.run, *call).result(PATIENCE_S)
    for later in (ranks.submit(lab.Lab.tell, 1), ranks.submit(lab.Lab.run, lab.sum_of, 1.0)):
        assert later.exception(PATIENCE_S) is told.value
    wait_for_the_end_of(ranks.pids)
    return told.value


def at_once(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs jobs side by side: most of their time they wait for a clock."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        for future in [threads.submit(job) for job in jobs]:
            future.result()


# --- checked mode


@pytest.fixture(scope="module")
def checked() -> Iterator[Ranks]:
    with ProcessRanks(THREE, lab.Lab, checked=True) as ranks:
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
def test_a_mismatch_says_who_came_with_what(checked: Ranks, how: str, odd: str, others: str) -> None:
    """Nothing was sent when it is found, so ranks that take it go on."""
    texts = checked.submit(lab.Lab.run, lab.differing, how).result(PATIENCE_S)
    assert texts == [texts[0]] * 3
    assert texts[0].startswith("ranks met in different collectives: rank 1 came to #")
    one, rest = texts[0].split(", ranks 0, 2 to #")
    assert odd in one and others in rest
    if how == "number":
        assert int(re.search(r"came to #(\d+)", one)[1]) == int(rest.split()[0]) + 1
        # Rank 1 is one ahead from now on, and nobody takes the error: it is the call's. The last test of this pool.
        error = error_of(checked, lab.in_different_labels)
        assert type(error) is CollectiveMismatchError
        assert 'barrier "layer 3 mlp"' in str(error) and "ranks 0, 2 to #" in str(error)
    else:
        assert checked.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S) == [6.0] * 3


# --- a rank that does not come


def skip(is_checked: bool) -> None:
    with ProcessRanks(TWO, lab.Lab, checked=is_checked, timeout_s=600) as ranks:
        error = error_of(ranks, lab.step_without, 1, "layer 7 experts")
        assert type(error) is RankError
        text = without_calls(error)
        assert text.startswith('rank 1 will not come; rank 0 waits at #2 all_reduce "layer 7 experts"')
        assert 'rank 1 last came to #1 barrier "start" of ranks 0, 1; rank 1 had ended that call' in text


def cross() -> None:
    """The field's commonest deadlock: one rank idle and one not."""
    with ProcessRanks(Mesh.of(dp=2, tp=2), lab.Lab, timeout_s=600) as ranks:
        text = without_calls(error_of(ranks, lab.in_different_groups))
        assert "rank 1 will not come" in text
        assert 'rank 0 waits at #0 barrier "attention sum"' in text
        assert 'rank 1 last came to #1 barrier "idle step" of ranks 0, 1, 2, 3' in text


def test_a_rank_that_will_never_come_is_named_at_once() -> None:
    """Long before the limit for one that is late: it has ended the call that others are in, or waits for them."""
    at_once([lambda: skip(False), cross])


@pytest.mark.full
def test_a_rank_that_will_never_come_is_named_in_checked_mode_too() -> None:
    skip(True)


def test_a_late_rank_is_waited_for_and_named_when_it_is_too_late() -> None:
    with ProcessRanks(TWO, lab.Lab, timeout_s=2.0) as ranks:
        assert ranks.submit(lab.Lab.run, lab.late, 1, 0.9).result(PATIENCE_S) == [None] * 2
        error = error_of(ranks, lab.late, 1, 20.0)
        assert type(error) is RankError
        assert without_calls(error) == (
            'rank 1 did not come within 2 s; rank 0 waits at #2 barrier "layer 7 experts"; '
            'rank 1 last came to #1 barrier "layer 7 experts" of ranks 0, 1'
        )


# --- a rank that raises


def test_an_error_keeps_its_type_and_fails_its_call_and_all_later_ones() -> None:
    rank = 0
    with ProcessRanks(TWO, lab.Lab) as ranks:
        before = ranks.submit(lab.Lab.tell, 7, 0.4)  # rank 1 is still in it when rank 0 fails
        bad = ranks.submit(lab.Lab.run, lab.fail, rank, ArithmeticError("worker broke"))
        after = ranks.submit(lab.Lab.run, lab.sum_of, 2.0)
        with pytest.raises(ArithmeticError, match="worker broke") as told:
            bad.result(PATIENCE_S)
        assert before.result(PATIENCE_S) == [7, 107]
        assert str(told.value) == "worker broke"
        notes = "\n".join(told.value.__notes__)
        assert f"rank {rank} (pid {ranks.pids[rank]} on " in notes and "in fail\n" in notes, "the rank's own traceback"
        for future in (after, ranks.submit(lab.Lab.run, lab.sum_of, 3.0)):
            assert future.exception(PATIENCE_S) is told.value
        wait_for_the_end_of(ranks.pids)


def test_an_error_that_cannot_be_sent_is_told_as_a_rank_error() -> None:
    with ProcessRanks(ONE, lab.Lab) as ranks:
        error = error_of(ranks, lab.fail, 0, "odd")
        assert type(error) is RankError
        assert re.fullmatch(r"rank 0 \(pid \d+ on .+\) failed: OddError: 1 and 2", str(error))


def test_a_result_that_cannot_be_sent_is_an_error_of_the_call() -> None:
    with ProcessRanks(ONE, lab.Lab) as ranks:
        assert "pickle" in str(error_of(ranks, lab.cannot_be_sent))


def cannot_be_built() -> None:
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        ProcessRanks(TWO, lab.Broken, timeout_s=600)


def ends_while_built() -> None:
    with pytest.raises(RankError, match=r"rank 1 \(pid \d+ on .+\) ended with exit code 7"):
        ProcessRanks(TWO, lab.Dead, timeout_s=600)


def test_what_goes_wrong_while_workers_are_built_is_raised_at_once() -> None:
    at_once([cannot_be_built, ends_while_built])


# --- a rank that is gone


def kill(rank: int, rows: int) -> None:
    with ProcessRanks(TWO, lab.Lab) as ranks:
        future = ranks.submit(lab.Lab.run, lab.spin, rows)
        time.sleep(0.3)
        os.kill(ranks.pids[rank], signal.SIGKILL)
        with pytest.raises(RankError) as told:
            future.result(PATIENCE_S)
        text = str(told.value)
        assert text.startswith(f"rank {rank} (pid {ranks.pids[rank]} on ")
        assert "was killed by signal 9 (SIGKILL)" in text
        assert re.search(rf"rank [^{rank}] \(pid \d+ on .+\) was at #\d+ all_reduce \"sum\"", text)
        wait_for_the_end_of(ranks.pids)


@pytest.mark.parametrize(("rank", "rows"), [(1, 4000), pytest.param(0, 1, marks=pytest.mark.full)])
def test_a_killed_rank_is_named_with_what_the_others_were_at(rank: int, rows: int) -> None:
    """Also in the middle of a large copy."""
    kill(rank, rows)


def test_a_killed_rank_is_named_over_gloo_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWS_NATIVE", "0")
    kill(1, 1)


def test_an_idle_rank_that_dies_fails_the_next_call() -> None:
    with ProcessRanks(ONE, lab.Lab) as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        wait_for_the_end_of(ranks.pids)
        with pytest.raises(RankError, match=r"rank 0 .* was killed by signal 9"):
            ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(PATIENCE_S)


# --- the coordinator

PROGRAM = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import ranks_lab as lab
    from narrows.ranks import ProcessRanks
    from narrows.layout import Mesh

    ranks = ProcessRanks(Mesh.of(dp=1, tp={num}), lab.Lab, timeout_s=600)
    print(*ranks.pids, flush=True)
    {then}
"""


def start_coordinator(num: int, then: str) -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).replace("{num}", str(num)).replace("{then}", then)
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def pids_of(coordinator: subprocess.Popen[str]) -> list[int]:
    assert coordinator.stdout is not None
    return [int(pid) for pid in coordinator.stdout.readline().split()]


def test_ranks_end_by_themselves_when_their_host_is_killed() -> None:
    """At work, idle, and before they have started: that none of the last is left is what the fixture looks for."""
    at_work, idle = (
        start_coordinator(2, "ranks.submit(lab.Lab.run, lab.spin).result()"),
        start_coordinator(1, "time.sleep(3600)"),
    )
    early = start_coordinator(1, "pass")
    with at_work, idle, early:
        time.sleep(0.5)
        early.kill()
        for coordinator in (at_work, idle):
            pids = pids_of(coordinator)
            assert pids and all(is_alive(pid) for pid in pids)
            time.sleep(0.2)
            coordinator.kill()
            wait_for_the_end_of(pids)
            assert coordinator.stderr is not None and coordinator.stderr.read() == ""


def test_an_owner_who_forgets_to_close_leaves_nothing() -> None:
    forgets = start_coordinator(1, "ranks.submit(lab.Lab.run, lab.sum_of, 1.0).result(); del ranks; time.sleep(3600)")
    ends = start_coordinator(2, "ranks.submit(lab.Lab.run, lab.spin)")  # at exit, with ranks at work
    with forgets, ends:
        wait_for_the_end_of(pids_of(forgets))
        assert forgets.poll() is None
        forgets.kill()
        pids = pids_of(ends)
        assert ends.wait(PATIENCE_S) == 0
        wait_for_the_end_of(pids)
        assert ends.stderr is not None and ends.stderr.read() == ""


def stop(rank: int, rows: int) -> None:
    with ProcessRanks(TWO, lab.Lab, timeout_s=600) as ranks:
        future = ranks.submit(lab.Lab.run, lab.spin, rows)
        time.sleep(0.3)
        os.kill(ranks.pids[rank], signal.SIGSTOP)
        with pytest.raises(RankError) as told:
            future.result(PATIENCE_S)
        assert f"rank {rank} (pid {ranks.pids[rank]} on " in str(told.value)
        assert "is stopped: nothing was heard for 6 s" in str(told.value)
        assert re.search(rf'rank {1 - rank} waits at #\d+ all_reduce "sum"', str(told.value))
        wait_for_the_end_of(ranks.pids)


def pause() -> None:
    """Ctrl-Z, and `fg` later than anyone's silence is borne."""
    with start_coordinator(
        2, "[ranks.submit(lab.Lab.run, lab.late, 0, 0.1).result() for i in range(20)]"
    ) as coordinator:
        pids = pids_of(coordinator)
        group = os.getpgid(coordinator.pid)
        assert {os.getpgid(pid) for pid in pids} == {group}
        os.killpg(group, signal.SIGSTOP)
        time.sleep(7.5)
        assert all(is_alive(pid) for pid in [coordinator.pid, *pids])
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.7)  # the coordinator is the last to wake up
        os.kill(coordinator.pid, signal.SIGCONT)
        assert coordinator.wait(PATIENCE_S) == 0
        assert coordinator.stderr is not None and coordinator.stderr.read() == ""
        wait_for_the_end_of(pids)


def stand_still() -> None:
    """A coordinator that is silent for long, as under one long C call, does not end its rank."""
    with start_coordinator(
        1, "[ranks.submit(lab.Lab.run, lab.late, 0, 0.1).result() for i in range(20)]"
    ) as coordinator:
        pids = pids_of(coordinator)
        os.kill(coordinator.pid, signal.SIGSTOP)
        try:
            time.sleep(7.5)
            assert all(is_alive(pid) for pid in pids)
        finally:
            os.kill(coordinator.pid, signal.SIGCONT)
        assert coordinator.wait(PATIENCE_S) == 0
        assert coordinator.stderr is not None and coordinator.stderr.read() == ""
        wait_for_the_end_of(pids)


def test_a_stopped_rank_is_named_and_all_end_but_a_stopped_host_and_stopped_ranks_go_on() -> None:
    at_once([lambda: stop(1, 4000), pause, stand_still])


@pytest.mark.full
def test_a_stopped_rank_0_is_named_too() -> None:
    stop(0, 1)
