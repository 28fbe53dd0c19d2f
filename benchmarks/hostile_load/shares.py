"""Who goes first where clients share the server's machine: observers before the server, attackers after it.

Real clients have their own machines. An observer that waits for a core would count its own wait as the server's
silence; an attacker that takes the server's core would show how a machine is shared, not what a server does. Linux may
share cores between sessions first (autogroups), and then a nice value counts within its session only: so both kinds of
process lead their own sessions.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["first_in_line", "last_in_line"]

_NICE = 10


def first_in_line() -> None:
    """This process runs as soon as it can: real-time priority, where the system allows it."""
    _lead_session()
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def last_in_line() -> None:
    """This process gets what the server leaves of the cores."""
    _lead_session()
    os.nice(_NICE)
    with suppress(OSError):  # a kernel without autogroups
        Path("/proc/self/autogroup").write_text(str(_NICE))


def _lead_session() -> None:
    with suppress(OSError):  # it leads one already
        os.setsid()
