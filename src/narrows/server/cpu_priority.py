"""CPU priority of the server's threads and processes: preparing requests yields to streaming tokens.

Linux keeps a nice value per thread. Elsewhere a value holds for the whole process, so threads keep theirs.
"""

from __future__ import annotations

import os
import sys
import threading

__all__ = ["BODY_NICE", "GRAMMAR_NICE", "lower_process_priority", "lower_thread_priority"]

BODY_NICE = 5
"""For reading and tokenizing bodies: on a machine with few cores this yields to the ranks and to streaming.
A higher value would leave a thread that holds the interpreter's lock without a core for long."""

GRAMMAR_NICE = 10
"""For trying and compiling grammars and for slow masks; such work does not hold the interpreter's lock."""


def lower_thread_priority(nice: int) -> None:
    """Give this thread the nice value ``nice``, unless it has a higher one; on Linux only."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


def lower_process_priority(nice: int) -> None:
    """Give this process the nice value ``nice``, unless it was born with a higher one by the thread that started it."""
    os.nice(max(0, nice - os.getpriority(os.PRIO_PROCESS, 0)))
