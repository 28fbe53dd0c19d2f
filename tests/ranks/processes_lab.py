"""What the system knows of processes: what a process has started, and which of it are ranks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["ancestors", "descendants", "name_of", "parent_of", "rank_pids"]


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` has started, those that these have started, and so on."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, path.read_text().split())
    return found[1:]


def parent_of(pid: int) -> int:
    """0 if it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def ancestors(pid: int) -> set[int]:
    """Its parent, its parent's parent, and so on, as far as they live."""
    found: set[int] = set()
    while pid > 1:
        pid = parent_of(pid)
        found.add(pid)
    return found


def name_of(pid: int) -> str:
    """What `ps -o comm` shows; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def rank_pids(pid: int) -> list[int]:
    """The ranks that a process has started through its fork server, in rank order."""
    ranks = {name: child for child in descendants(pid) if (name := name_of(child)).startswith("narrows rank ")}
    return [ranks[name] for name in sorted(ranks, key=lambda name: int(name.split()[-1]))]
