"""The environment of ranks that a profile must match."""

from __future__ import annotations

from narrows.comm.device import gpu_name
from narrows.cost.environment import MachineFingerprint, no_shared_memory, this_machine

__all__ = ["setting_of", "world_name"]


def world_name(*, run_on: str, ranks: str, hosts: int) -> str:
    """How ranks exchange, by the name that profiles use."""
    if ranks == "threads":
        return "threads"
    if run_on == "cuda":
        return "nccl"
    if no_shared_memory():
        return "gloo"
    return "shm" if hosts == 1 else "shm+gloo"


def setting_of(*, run_on: str, ranks: str, hosts: int, num_ranks: int, threads: int) -> MachineFingerprint:
    """The environment that a profile must match for such ranks here."""
    return this_machine(
        ranks=num_ranks,
        threads=threads,
        world=world_name(run_on=run_on, ranks=ranks, hosts=hosts),
        card=gpu_name() if run_on == "cuda" else "",
        hosts=hosts,
    )
