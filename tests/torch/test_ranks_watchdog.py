"""The watchdog's verdicts on ranks that keep others waiting, from their reports alone. No process is started."""

from __future__ import annotations

from narrows.comm.fingerprint import Fingerprint
from narrows.ranks.timing import TIMING
from narrows.ranks.watchdog import Report, Watchdog

STUCK_S = TIMING.stuck_s
ALL, TP = (0, 1, 2), (0, 1)


def at(number: int, *, ranks: tuple[int, ...] = ALL, done: int = 1, age_s: float = 0.0, waits: bool = True) -> Report:
    """A rank that is in (or has left) its collective ``number`` of ``ranks``, in its call number ``done``."""
    fingerprint = Fingerprint(number, "all_reduce", f"layer {number}", len(ranks))
    return Report(done, ((ranks, number + 1),), (fingerprint, ranks), waits, age_s)


def test_a_late_rank_is_overdue() -> None:
    watchdog = Watchdog(3, timeout_s=10)
    watchdog.hear(0, at(5, age_s=4), 100.0)
    watchdog.hear(1, at(4, waits=False), 100.0)  # it computes
    watchdog.hear(2, at(5, age_s=3), 100.0)
    assert watchdog.verdict(2, 100.0) is None
    watchdog.hear(0, at(5, age_s=10.5), 106.5)
    assert watchdog.verdict(2, 106.5) is None, "rank 1's report from before the timeout is no evidence"
    watchdog.hear(1, at(5, age_s=0.1), 106.9)
    assert watchdog.verdict(2, 107.0) is None, "it has entered meanwhile"
    watchdog.hear(1, at(4, waits=False), 106.9)
    ranks, why = watchdog.verdict(2, 107.0)
    assert ranks == [1]
    assert why == (
        'did not come within 10 s; rank 0 waits at #5 all_reduce "layer 5"; rank 2 waits at #5 all_reduce "layer 5"; '
        'rank 1 last came to #4 all_reduce "layer 4" of ranks 0, 1, 2'
    )


def test_a_rank_that_is_ahead_is_not_missing() -> None:
    """It has sent its part of the collective, and has moved on."""
    watchdog = Watchdog(3, timeout_s=10)
    for rank in range(3):
        watchdog.hear(rank, at(5, age_s=99) if rank else at(7, waits=False), 100.0)
    assert watchdog.missing(1) == [] and watchdog.verdict(2, 100.0) is None


def test_a_collective_that_all_are_in_and_that_does_not_end_is_the_networks() -> None:
    watchdog = Watchdog(3, timeout_s=10)
    for rank in range(3):
        watchdog.hear(rank, at(5, age_s=10 if rank else 9.9), 100.0)
    assert watchdog.verdict(2, 100.0) is None, "rank 0 has not waited so long"
    watchdog.hear(0, at(5, age_s=10), 100.1)
    ranks, why = watchdog.verdict(2, 100.1)
    assert ranks == [0, 1, 2]
    assert why.startswith('all came to #5 all_reduce "layer 5", which was not done within 10 s: the network between')


def everyone(watchdog: Watchdog, reports: list[Report], now: float) -> None:
    for rank, report in enumerate(reports):
        watchdog.hear(rank, report, now)


def test_a_rank_that_has_ended_the_call_is_stuck() -> None:
    watchdog = Watchdog(3, timeout_s=600)
    said = [at(5), at(4, waits=False, done=2), at(5)]
    everyone(watchdog, said, 100.0)
    everyone(watchdog, said, 100.0 + STUCK_S)
    assert watchdog.verdict(3, 100.0 + STUCK_S) is None, "it has a third call, and may enter the collective there"
    assert watchdog.verdict(2, 100.0 + STUCK_S - 0.1) is None, "not at once"
    ranks, why = watchdog.verdict(2, 100.0 + STUCK_S)
    assert ranks == [1] and why.startswith('will not come; rank 0 waits at #5 all_reduce "layer 5"; rank 2 waits')
    assert why.endswith("; rank 1 had ended that call")
    watchdog.hear(1, at(5), 100.0 + STUCK_S)
    assert watchdog.verdict(2, 100.0 + STUCK_S) is None


def test_ranks_that_wait_for_each_other_are_stuck() -> None:
    watchdog = Watchdog(3, timeout_s=600)
    crossed = [at(2, ranks=TP), at(5), at(5)]  # 0 waits for 1, which waits for 0; 2 waits for 0 too
    everyone(watchdog, crossed, 100.0)
    everyone(watchdog, crossed, 104.0)
    ranks, why = watchdog.verdict(2, 104.0)
    assert ranks == [1] and 'rank 0 waits at #2 all_reduce "layer 2"' in why and '"layer 5" of ranks 0, 1, 2' in why
    busy = [at(2, ranks=TP), at(1, waits=False), at(5)]  # 1 computes: 0 waits for it, and 2 for both
    watchdog = Watchdog(3, timeout_s=600)
    everyone(watchdog, busy, 100.0)
    everyone(watchdog, busy, 104.0)
    assert watchdog.verdict(2, 104.0) is None


def test_the_named_rank_does_not_depend_on_order() -> None:
    """Rank 0 waits for 1 in a group of two; 1 waits for all of four; 2 and 3 have done all their calls."""
    four, low, high = (0, 1, 2, 3), (0, 1), (2, 3)
    crossed = [at(0, ranks=low), at(1, ranks=four)]
    crossed += [at(0, ranks=high, waits=False, done=2)] * 2
    for late in range(4):
        watchdog = Watchdog(4, timeout_s=600)
        for rank, report in enumerate(crossed):
            watchdog.hear(rank, report, 100.4 if rank == late else 100.0)
        everyone(watchdog, crossed, 103.1)
        early = watchdog.verdict(2, 103.1)
        if late in low:
            assert early is None, "not all who are held up have waited so long"
        else:
            assert early is not None and early[0] == [1]
        everyone(watchdog, crossed, 103.5)
        ranks, why = watchdog.verdict(2, 103.5)
        assert ranks == [1] and why.startswith('will not come; rank 0 waits at #0 all_reduce "layer 0"')


def test_old_reports_are_no_evidence() -> None:
    watchdog = Watchdog(3, timeout_s=600)
    said = [at(5), at(4, waits=False, done=2), at(5)]
    everyone(watchdog, said, 100.0)
    for rank in (0, 2):
        watchdog.hear(rank, said[rank], 104.0)
    assert watchdog.verdict(2, 104.0) is None
    assert watchdog.waiting_for([1]) == (
        'rank 0 waits at #5 all_reduce "layer 5"; rank 2 waits at #5 all_reduce "layer 5"'
    )
    assert watchdog.waiting_for([0, 1, 2]) == ""
