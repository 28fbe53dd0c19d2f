"""Where an engine's ranks run: threads of this process, or processes on one host or several. The one door to both.

Knows the two implementations and what the config asks for; not what ranks do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from narrows.comm.communicator import Communicator
from narrows.engine.config import Resolved
from narrows.plan.plan import Plan
from narrows.ranks.calls import Ranks
from narrows.ranks.processes import ProcessRanks, serve_node
from narrows.ranks.rank_process import obey
from narrows.ranks.threads import ThreadRanks
from narrows.ranks.timing import TIMING, Timing

__all__ = ["obey_host", "start_ranks"]

Worker = TypeVar("Worker")


def start_ranks(resolved: Resolved, make: Callable[[Communicator], Worker], timing: Timing = TIMING) -> Ranks[Worker]:
    """The ranks that ``resolved`` asks for, each with the worker that ``make`` builds there.

    Raises:
        the first error of ``make``; RankError if a rank does not start.
    """
    asked = resolved.asked
    if asked.ranks == "threads":
        return ThreadRanks(
            resolved.mesh,
            make,
            checked=asked.checked,
            timeout_s=asked.timeout_s,
            num_threads=resolved.threads,
            device=asked.run_on,
        )
    return ProcessRanks(
        resolved.mesh,
        make,
        checked=asked.checked,
        timeout_s=asked.timeout_s,
        num_threads=resolved.threads,
        launch=asked.launch,
        once=(Plan,),
        device=asked.run_on,
        timing=timing,
    )


def obey_host(resolved: Resolved) -> int:
    """For a process that is not the host of its launch: runs its ranks for the host; the host's exit code.

    Raises:
        RankError: the host is not there, or went away.
    """
    launch = resolved.asked.launch
    assert launch is not None and not launch.hosts
    return obey(launch) if launch.by_torchrun else serve_node(launch)
