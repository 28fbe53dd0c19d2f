"""Bytes of memory that this process can take, still and in all: of the machine, or of the container it runs in."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_memory", "total_memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Bytes that can be taken without swapping.

    Linux's own estimate (MemAvailable), and no more than what a container's limit leaves (cgroup v2: what the container
    holds of files' pages counts as free, since it can be dropped). Elsewhere the free pages.
    """
    if not meminfo.is_file():
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    machine = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    left = _left_in_container(cgroup)
    return machine if left is None else min(machine, left)


def total_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of the machine, and no more than a container's limit (cgroup v2), used or not."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        return machine if limit == "max" else min(machine, int(limit))
    except (OSError, ValueError):
        return machine


def _left_in_container(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        held = int((cgroup / "memory.current").read_text(encoding="ascii"))
        stat = (line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    droppable = next((int(words[1]) for words in stat if words[0] == "inactive_file"), 0)
    return max(int(limit) - held + droppable, 0)
