"""The device of a rank's tensors: the CPU, or a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from narrows.errors import ConfigError

__all__ = ["DeviceGraph", "gpu_name", "graphs_of", "is_synchronous", "num_gpus", "rank_device", "synchronize"]


def gpu_name() -> str:
    """The name of this host's first GPU, as its driver reports it.

    Raises:
        ConfigError: torch sees no GPU here.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} sees none" if built else f"torch {torch.__version__} is a build for CPUs"
        raise ConfigError(f"--run-on cuda needs an NVIDIA GPU, and {why}; leave --run-on out to run on the CPU")
    return torch.cuda.get_device_name(0)


def num_gpus() -> int:
    """GPUs that torch sees on this host."""
    return torch.cuda.device_count()


def rank_device(run_on: str, local_rank: int) -> torch.device:
    """The device of the rank with this number on its host, made current.

    Each rank process has a GPU of its own; rank threads all have local rank 0.

    Raises:
        ConfigError: the host has fewer GPUs than ranks.
    """
    if run_on == "cpu":
        return torch.device("cpu")
    if local_rank >= num_gpus():
        raise ConfigError(
            f"rank process {local_rank + 1} of this host needs a GPU of its own, and the host has {num_gpus()}; start "
            "fewer ranks, or --ranks threads, which share the first GPU (for checks: they are no faster than one)"
        )
    found = torch.device(run_on, local_rank)
    torch.cuda.set_device(found)
    return found


class DeviceGraph:
    """Work of a GPU, captured once and then launched as one. Graphs of one ``pool`` share memory: none of them may run
    beside another."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, walk: Callable[[], None]) -> None:
        """Captures what ``walk`` gives the GPU, without running it."""
        torch.cuda.synchronize()
        # Other threads of this process may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            walk()

    def replay(self) -> None:
        """Launches it, behind all work that the GPU was given before."""
        self._graph.replay()


def graphs_of(device: torch.device) -> Callable[[], DeviceGraph] | None:
    """What makes graphs on this device, all of one pool; None where there are none."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda: DeviceGraph(pool)


def is_synchronous(run_on: str) -> bool:
    """Whether an operation is done when its call returns, so that a clock around the call measures it."""
    return run_on == "cpu"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all work that it was given. A CPU does it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
