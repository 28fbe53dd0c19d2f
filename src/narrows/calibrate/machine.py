"""Where a benchmark ran: the machine, the versions, and the memory of its processes.

Reads /proc and torch's list of GPUs, and imports no torch itself.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from narrows.cost.environment import cpu_facts, num_cores
from narrows.native import kernels, why_absent

__all__ = ["available_memory", "machine", "proportional_memory", "versions"]


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, how busy it is, and the GPUs, if there are any."""
    cpu, features = cpu_facts()
    memory = _pairs("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
    torch = sys.modules.get("torch")  # whatever runs on a GPU has imported it; a client of a server need not
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": cpu,
        "features": list(features),
        "cores": num_cores(),
        "memory_gib": round(int(memory) / (1 << 20), 1),
        **({"gpus": gpus} if gpus else {}),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def available_memory() -> int | None:
    """Bytes that this host could give to new work now; None if it does not say."""
    available = _pairs("/proc/meminfo").get("MemAvailable")
    return int(available.split()[0]) << 10 if available else None


def versions() -> dict[str, str]:
    """Of narrows and what its speed depends on."""
    return {
        "narrows": version("narrows"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "compiled_code": f"kernels for {running.target}" if (running := kernels()) else f"not used: {why_absent()}",
    }


def proportional_memory(pids: Iterable[int]) -> int:
    """Bytes of memory of some processes; what several of them map is counted once in all (PSS).

    A process that has ended, or that this user may not look at, counts nothing.
    """
    total = 0
    for pid in pids:
        pss = _pairs(f"/proc/{pid}/smaps_rollup").get("Pss", "0 kB")
        total += int(pss.split()[0]) << 10
    return total


def _pairs(file: str) -> dict[str, str]:
    """The first value of every name in a file of ``name: value`` lines; nothing if it cannot be read."""
    pairs: dict[str, str] = {}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return pairs
    for line in lines:
        name, _, value = line.partition(":")
        pairs.setdefault(name.strip(), value.strip())
    return pairs
