"""Decides when a rank counts as dead, silent, late or stuck, and words the error that names it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from pathlib import Path

from narrows.comm.fingerprint import rank_names
from narrows.errors import RankError
from narrows.ranks.messages import Failure
from narrows.ranks.peers import Peer, Peers
from narrows.ranks.spawn import Processes, ending
from narrows.ranks.timing import Timing
from narrows.ranks.watchdog import Report, Watchdog

__all__ = ["FailureDetector"]


class FailureDetector:
    """Evidence about the ranks of one mesh. Times are any clock's, the same in every call; any thread may call.

    Args:
        processes: the ranks on this host, whose state and exit code the kernel knows.
        timeout_s: how long a rank that lives may keep the others waiting at a collective.
    """

    def __init__(
        self, peers: Peers, processes: Processes, timing: Timing, num_ranks: int, timeout_s: float, now: float
    ) -> None:
        self.judged_at = now
        self._peers, self._processes, self._timing = peers, processes, timing
        self._num_ranks = num_ranks
        self._watchdog = Watchdog(num_ranks, timeout_s, timing.stuck_s)
        self._changed = threading.Condition()  # guards all that follows
        self._closed = False
        self._lost: list[str] = []
        self._suspicion: tuple[float, RankError] | None = None

    # --- evidence

    def heartbeat(self, rank: int, report: Report, now: float) -> None:
        """What a rank reports of itself."""
        with self._changed:
            self._watchdog.hear(rank, report, now)

    def peer_lost(self, peer: Peer, failure: Failure, now: float) -> None:
        """A rank's collective failed because one of its members went away; which one is not known yet."""
        error = RankError(f"{peer} lost its peers at {failure.lost}: {failure.text}")
        with self._changed:
            self._lost.append(f"{peer} was at {failure.lost}")
            self._suspicion = self._suspicion or (now, error)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is judged any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- verdicts

    def judge(self, num_calls: int | None, now: float) -> RankError | None:
        """The error that ends the ranks, if the evidence suffices.

        ``num_calls``: calls that every rank was given so far; None while no call is pending.
        """
        forgive = now - self.judged_at > self._timing.suspended_s  # this process was suspended, and heard no rank
        self.judged_at = now
        if forgive:
            for peer in list(self._peers.all):
                peer.heard = now
        if any(now - peer.heard > self._timing.silence_s for peer in list(self._peers.all)):
            return RankError(self._silence(now))
        with self._changed:
            if self._suspicion is not None:
                since, error = self._suspicion
                return error if now - since > self._timing.blame_s else None
            verdict = None if num_calls is None else self._watchdog.verdict(num_calls, now)
        if verdict is None:
            return None
        ranks, why = verdict
        return RankError(f"{rank_names(ranks)} {why}")

    def death(self, peer: Peer, *, at_work: bool, checked: bool) -> RankError:
        """The error of a peer whose connection has ended. ``at_work``: wait until the others say what they were at."""
        why = "is gone: its connection was closed"
        process = self._processes.get(peer.rank) if peer.rank is not None else None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._timing.exit_s)
                why = ending(process)
                if process.returncode == -signal.SIGABRT and not checked:
                    why += "; if collectives did not match, checked mode names them"
        with self._changed:
            if at_work:
                others = self._num_ranks - 1
                self._changed.wait_for(lambda: len(self._lost) >= others or self._closed, self._timing.tell_s)
            return RankError(f"{peer} {'; '.join([why, *self._lost])}")

    def _silence(self, now: float) -> str:
        """Names all silent peers: if a host has vanished, those are all its ranks."""
        timing = self._timing
        silent = [peer for peer in list(self._peers.all) if now - peer.heard > timing.silence_s - timing.suspended_s]
        silent.sort(key=lambda peer: (peer.rank is None, peer.rank))
        names = ", ".join(f"{peer}{self._state(peer)}" for peer in silent)
        text = f"{names}: nothing was heard for {timing.silence_s:g} s"
        with self._changed:
            waiting = self._watchdog.waiting_for([peer.rank for peer in silent if peer.rank is not None])
        return f"{text}; {waiting}" if waiting else text

    def _state(self, peer: Peer) -> str:
        """What the kernel says of a silent rank on this host; empty for others."""
        if peer.rank not in self._processes:
            return ""
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return " is stopped" if state in "Tt" else " lives, but does not answer"
        return ""
