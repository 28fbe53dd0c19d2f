"""How many files and connections this process may have open, and how many connections that leaves room for."""

from __future__ import annotations

import resource
from contextlib import suppress

from narrows.errors import ConfigError

__all__ = ["MAX_CONNECTIONS", "RESERVED_PLACES", "connections_for", "raise_descriptor_limit"]

MAX_CONNECTIONS = 4096
"""Connections at once unless a flag says otherwise: more than texts may run and wait."""

RESERVED_PLACES = 16
"""Connections beyond those, which may ask for /health and /metrics only."""

_MOST_DESCRIPTORS = 1 << 20
_OWN_DESCRIPTORS = 256
"""Kept for the model's files, pipes to ranks, and libraries; half of all where the limit is lower than twice that."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, as far as 2**20. Returns the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_for(asked: int | None, descriptors: int) -> tuple[int, str]:
    """The limit of connections and, where open files hold it below the usual, a line that says so.

    Raises:
        ConfigError: more are asked for than files may be open.
    """
    room = descriptors - min(_OWN_DESCRIPTORS, descriptors // 2) - RESERVED_PLACES
    limit = f"this process may open {descriptors} files (ulimit -n), which is room for {room} connections"
    if room < 1:
        raise ConfigError(f"{limit}; raise the limit to {2 * RESERVED_PLACES + 1} at least")
    if asked is not None and asked > room:
        raise ConfigError(f"--max-connections is {asked}; {limit}: raise the limit or ask for fewer")
    if asked is not None:
        return asked, ""
    if room < MAX_CONNECTIONS:
        return room, f"{limit}; more of them make room or are refused"
    return MAX_CONNECTIONS, ""
