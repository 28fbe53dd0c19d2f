"""Where an engine's ranks run: threads of this process, or processes on one host or several. The one door to both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from narrows.comm.communicator import Communicator
from narrows.engine.config import EngineConfig, Resolved
from narrows.plan.plan import Plan
from narrows.ranks.calls import Ranks
from narrows.ranks.fork_server import fork_server
from narrows.ranks.node import run_node, run_series
from narrows.ranks.processes import ProcessRanks
from narrows.ranks.rank_process import run_torchrun_rank
from narrows.ranks.start_clock import StartClock
from narrows.ranks.threads import ThreadRanks
from narrows.ranks.timing import TIMING, Timing

__all__ = ["prepare_ranks", "run_local_ranks", "start_ranks"]

Worker = TypeVar("Worker")


def prepare_ranks(config: EngineConfig) -> None:
    """Starts what forks the ranks of ``config``, if anything does, while this process has one thread and no socket that
    ranks would hold too. Without it that is done when ranks are first started."""
    if config.ranks == "processes" and config.run_on == "cpu":
        fork_server(fork_self=config.fork_self)


def start_ranks(
    resolved: Resolved,
    make: Callable[[Communicator], Worker],
    timing: Timing = TIMING,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    clock: StartClock | None = None,
) -> Ranks[Worker]:
    """The ranks of ``resolved``, each with the worker that ``make`` builds there.

    ``meanwhile``: called once, when it may start threads, before the ranks are ready. ``clock``: gets the phases.

    Raises:
        the first error of ``make``; RankError if a rank does not start.
    """
    config = resolved.engine_config
    if config.ranks == "threads":
        meanwhile()
        threads = ThreadRanks(
            resolved.mesh,
            make,
            checked=config.checked,
            timeout_s=config.timeout_s,
            num_threads=resolved.threads,
            device=config.run_on,
        )
        if clock is not None:
            clock.end("weights on the ranks")
        return threads
    return ProcessRanks(
        resolved.mesh,
        make,
        checked=config.checked,
        timeout_s=config.timeout_s,
        num_threads=resolved.threads,
        launch=config.launch and config.launch.world(),
        once=(Plan,),
        device=config.run_on,
        timing=timing,
        fork_self=config.fork_self,
        meanwhile=meanwhile,
        clock=clock,
    )


def run_local_ranks(resolved: Resolved) -> int:
    """In a process that is not the coordinator: runs its ranks until the coordinator ends them; returns its exit code.

    Raises:
        RankError: the coordinator was not found, or is gone.
    """
    launch = resolved.engine_config.launch
    assert launch is not None and not launch.is_coordinator
    if launch.series is not None:
        return run_series(launch)
    return run_torchrun_rank(launch) if launch.by_torchrun else run_node(launch)
