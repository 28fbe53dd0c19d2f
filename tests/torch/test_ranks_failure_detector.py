"""Failures of ranks are detected by an injected clock. No process, no thread but the test's, and no waiting."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from patience import PATIENCE_S

from narrows.comm.fingerprint import Fingerprint
from narrows.errors import ConfigError, RankError
from narrows.ranks.channel import Channel, keepalive_options, listen
from narrows.ranks.failure_detector import FailureDetector
from narrows.ranks.messages import BEAT, HELLO, Failure, hello
from narrows.ranks.peers import Peer, Peers
from narrows.ranks.pending import PendingCalls
from narrows.ranks.spawn import Processes
from narrows.ranks.timing import Timing
from narrows.ranks.watchdog import Report

TIMING = Timing(silence_s=600.0, suspended_s=200.0, blame_s=50.0, tell_s=0.0)
KEY = b"k" * 32
LOST = Failure(0, None, "PeersLostError", "connection reset", "", lost='#3 all_reduce "sum"')


class Scene:
    """Two ranks that have connected, and a clock."""

    def __init__(self, processes: Processes) -> None:
        self.now = 1000.0
        self.peers = Peers(2)
        self.channels: list[Channel] = []
        for rank in range(2):
            here, there = pair()
            there.send(HELLO, pickle.dumps(hello(rank, 0, os.getpid())))
            self.peers.admit(here, PATIENCE_S, self.now)
            self.channels += [here, there]
        self.detector = FailureDetector(self.peers, processes, TIMING, 2, 60.0, self.now)

    def after(self, seconds: float, *beating: int, num_calls: int | None = None) -> RankError | None:
        """Time passes, these ranks send a heartbeat, and the ranks are judged."""
        self.now += seconds
        for rank in beating:
            self.peers.ranks[rank].heard = self.now
            self.detector.heartbeat(rank, Report(), self.now)
        return self.detector.judge(num_calls, self.now)

    def silence_s(self) -> tuple[float, ...]:
        return self.peers.silence_s(self.detector.judged_at)


def pair() -> tuple[Channel, Channel]:
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as threads:
        there = threads.submit(Channel.connect, "127.0.0.1", listener.getsockname()[1], KEY)
        return Channel.accept(listener.accept()[0], KEY), there.result(PATIENCE_S)


@pytest.fixture
def processes() -> Processes:
    return {}


@pytest.fixture
def scene(processes: Processes) -> Iterator[Scene]:
    made = Scene(processes)
    yield made
    for channel in made.channels:
        channel.close()


def test_a_silent_rank_is_named(scene: Scene) -> None:
    for _ in range(4):
        assert scene.after(150.0, 0) is None
    assert scene.silence_s() == (0.0, 600.0)
    error = scene.after(1.0)
    assert str(error).startswith(f"rank 1 (pid {os.getpid()} on ")
    assert str(error).endswith("): nothing was heard for 600 s")


def test_ranks_that_died_together_are_named_together(scene: Scene) -> None:
    scene.after(150.0, 0)
    for _ in range(4):
        assert scene.after(100.0) is None
    error = scene.after(60.0)
    assert "rank 0 (pid " in str(error) and ", rank 1 (pid " in str(error)


def test_a_suspended_coordinator_forgives_silence(scene: Scene) -> None:
    assert scene.after(150.0) is None
    assert scene.silence_s() == (150.0, 150.0)
    assert scene.after(5000.0) is None
    assert scene.silence_s() == (0.0, 0.0)


def test_an_error_names_the_calls_that_a_silent_rank_delays(scene: Scene) -> None:
    fingerprint = Fingerprint(5, "all_reduce", "layer 5", 2)
    waits = Report(0, (((0, 1), 6),), (fingerprint, (0, 1)), True, 1.0)
    for _ in range(4):
        scene.after(150.0, 0)
        scene.detector.heartbeat(0, waits, scene.now)
    assert str(scene.after(1.0, num_calls=1)).endswith(' for 600 s; rank 0 waits at #5 all_reduce "layer 5"')


def test_a_rank_that_lost_an_unknown_peer_is_named_after_a_while(scene: Scene) -> None:
    """Meanwhile the peer's own end may become known, which is a better error."""
    scene.detector.peer_lost(scene.peers.ranks[0], LOST, scene.now)
    assert scene.after(50.0, 0, 1) is None
    error = scene.after(1.0, 0, 1)
    assert str(error).startswith("rank 0 (pid ")
    assert str(error).endswith(') lost its peers at #3 all_reduce "sum": connection reset')


@pytest.mark.parametrize(
    ("program", "checked", "text"),
    [
        ("raise SystemExit(7)", False, "ended with exit code 7"),
        ("import os; os.kill(os.getpid(), 9)", False, "was killed by signal 9 (SIGKILL)"),
        ("import os; os.abort()", True, "was killed by signal 6 (SIGABRT)"),
        (
            "import os; os.abort()",
            False,
            "was killed by signal 6 (SIGABRT); if collectives did not match, checked mode names them",
        ),
    ],
)
def test_a_death_report_has_the_exit_code_or_signal(
    scene: Scene, processes: Processes, program: str, checked: bool, text: str
) -> None:
    processes[1] = subprocess.Popen([sys.executable, "-S", "-c", program])
    processes[1].wait(PATIENCE_S)
    scene.detector.peer_lost(scene.peers.ranks[0], LOST, scene.now)
    error = scene.detector.death(scene.peers.ranks[1], at_work=True, checked=checked)
    first = scene.peers.ranks[0]
    assert str(error) == f'{scene.peers.ranks[1]} {text}; {first} was at #3 all_reduce "sum"'


def test_a_death_on_another_host_is_reported_as_a_closed_connection(scene: Scene) -> None:
    error = scene.detector.death(scene.peers.ranks[1], at_work=False, checked=True)
    assert str(error) == f"{scene.peers.ranks[1]} is gone: its connection was closed"


def test_a_peer_must_greet_first_and_run_the_same_versions(scene: Scene) -> None:
    here, there = pair()
    there.send(BEAT)
    assert scene.peers.admit(here, PATIENCE_S, scene.now) is None
    there.close()
    here, there = pair()
    there.send(HELLO, pickle.dumps(hello(None, 1, 5)._replace(versions="Python 2.7")))
    with pytest.raises(
        ConfigError, match=r"node 1 \(pid 5 on .*\) runs Python 2\.7, but its coordinator runs Python 3"
    ):
        scene.peers.admit(here, PATIENCE_S, scene.now)
    for channel in (here, there):
        channel.close()


def test_a_peer_is_a_rank_or_a_node() -> None:
    here, there = pair()
    assert str(Peer(here, hello(None, 1, 5), 0.0)) == f"node 1 (pid 5 on {socket.gethostname()})"
    for channel in (here, there):
        channel.close()


@pytest.mark.parametrize(
    ("silence_s", "count", "user_ms"), [(6.0, 4, 6000), (0.5, 1, 3000), (60.0, 58, 60000), (600.0, 127, 600000)]
)
def test_keepalive_follows_the_timing(silence_s: float, count: int, user_ms: int) -> None:
    """Probes start after 2 s and come every second, so 3 s are the least."""
    options = keepalive_options(silence_s)
    assert options == {
        "TCP_KEEPIDLE": 2,
        "TCP_KEEPALIVE": 2,
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": count,
        "TCP_USER_TIMEOUT": user_ms,
    }
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()) as sock:
        Channel(sock, silence_s)
        for name, value in options.items():
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_the_first_failure_counts_and_spares_earlier_calls() -> None:
    calls = PendingCalls()
    first, second = calls.add(2), calls.add(2)
    error = ArithmeticError("worker broke")
    calls.fail(error, 1, 5.0)
    calls.fail(ValueError("later"), 0, 6.0)
    assert calls.failure is error and calls.failed_at == 5.0
    assert second.exception(0) is error and not first.done() and len(calls) == 1
    calls.done(0, 0, "a")
    calls.done(1, 0, "b")
    calls.done(1, 1, "too late")
    assert first.result(0) == ["a", "b"] and calls.refusal("step") is error
    calls.close()


def test_closing_fails_the_calls_that_are_left() -> None:
    calls = PendingCalls()
    left = calls.add(1)
    assert calls.refusal("step") is None
    calls.close()
    for error in (left.exception(0), calls.refusal("step")):
        assert isinstance(error, RankError) and "closed" in str(error)
