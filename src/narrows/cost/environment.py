"""The fingerprint of this machine (CPU, cores, versions), by which a profile says what it was made for."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from narrows.native import kernels, why_absent
from narrows.native.library import sources_digest

__all__ = ["CPU_FEATURES", "MachineFingerprint", "cpu_facts", "no_shared_memory", "num_cores", "this_machine"]

CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8", "sve", "bf16"),
)
"""What the speed of CPU products depends on, by the names in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFingerprint:
    """All that prices depend on beside models and row counts. An empty text or 0: prices hold whatever it is.

    ``world``: how ranks exchange: ``shm``, ``threads``, ``gloo`` or ``nccl``; ``shm+gloo`` on several ``hosts``;
    ``alone`` for one rank.
    """

    cpu: str = ""
    features: str = ""
    cores: int = 0
    card: str = ""
    ranks: int = 0
    threads: int = 0
    world: str = ""
    hosts: int = 0
    narrows: str = ""
    torch: str = ""
    compiled_code: str = ""

    def misfit(self, other: MachineFingerprint, *, whatever: Collection[str] = ()) -> str:
        """Where a profile made for this setting does not fit ``other``, in words; empty where it does. ``whatever``:
        fields that may differ."""
        found = []
        for field in fields(self):
            if field.name in whatever:
                continue
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine and mine != theirs:
                found.append(f"{field.name.replace('_', ' ')} {mine!r} there, {theirs!r} here")
        return "; ".join(found)

    def document(self) -> dict[str, str | int]:
        """As plain data, without what it leaves open."""
        return {name: value for name, value in asdict(self).items() if value}


def this_machine(*, ranks: int, threads: int, world: str, card: str = "", hosts: int = 1) -> MachineFingerprint:
    """This machine, with so many ranks of so many threads that exchange through ``world``, on ``hosts`` like it."""
    cpu, features = cpu_facts()
    return MachineFingerprint(
        cpu=cpu,
        features=" ".join(features),
        cores=num_cores(),
        card=card,
        ranks=ranks,
        threads=threads,
        world="alone" if ranks == 1 else world,
        hosts=hosts,
        narrows=_version("narrows"),
        torch=_version("torch"),
        compiled_code=_compiled_code(),
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_facts() -> tuple[str, tuple[str, ...]]:
    """The CPU's name, and which of CPU_FEATURES it has."""
    info: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    flags = set(info.get("flags", info.get("Features", "")).split())
    name = info.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in CPU_FEATURES if feature in flags)


def no_shared_memory() -> str:
    """Why rank processes of this host cannot share memory, in one clause; empty where they can."""
    if os.environ.get("NARROWS_SHM", "1") == "0":
        return "NARROWS_SHM=0"
    if why := why_absent():
        return f"no compiled code: {why}"
    return "" if hasattr(os, "memfd_create") else "this system has no memory without a name (memfd)"


def _compiled_code() -> str:
    """The kernels that run, and what they were made of: prices hold for these."""
    running = kernels()
    return "none" if running is None else f"{running.target} {sources_digest()[:12]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
