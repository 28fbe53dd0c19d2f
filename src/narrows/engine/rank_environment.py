"""How ranks of an engine exchange on this machine, and the fingerprint that a profile of them must have."""

from __future__ import annotations

from narrows.comm.device import gpu_name
from narrows.cost.environment import MachineFingerprint, no_shared_memory, this_machine

__all__ = ["rank_fingerprint", "transport_name"]


def transport_name(*, run_on: str, ranks: str, hosts: int) -> str:
    """How such ranks exchange: ``threads``, ``shm``, ``gloo``, ``nccl`` or ``shm+gloo``, as profiles name it."""
    if ranks == "threads":
        return "threads"
    if run_on == "cuda":
        return "nccl"
    if no_shared_memory():
        return "gloo"
    return "shm" if hosts == 1 else "shm+gloo"


def rank_fingerprint(*, run_on: str, ranks: str, hosts: int, num_ranks: int, threads: int) -> MachineFingerprint:
    """What a profile must match to be used for such ranks on this machine."""
    return this_machine(
        ranks=num_ranks,
        threads=threads,
        world=transport_name(run_on=run_on, ranks=ranks, hosts=hosts),
        card=gpu_name() if run_on == "cuda" else "",
        hosts=hosts,
    )
