"""The device of a rank's tensors: the CPU, or a GPU of its own."""

from __future__ import annotations

import torch

from narrows.errors import ConfigError

__all__ = ["card_name", "finished", "is_done_when_called", "num_cards", "rank_device"]


def card_name() -> str:
    """The name of this host's first GPU, as its driver says it.

    Raises:
        ConfigError: torch sees no GPU here.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} sees none" if built else f"torch {torch.__version__} is a build for CPUs"
        raise ConfigError(f"--run-on cuda needs an NVIDIA GPU, and {why}; leave --run-on out to run on the CPU")
    return torch.cuda.get_device_name(0)


def num_cards() -> int:
    """GPUs that torch sees on this host."""
    return torch.cuda.device_count()


def rank_device(run_on: str, place: int) -> torch.device:
    """The device of the rank that is number ``place`` on its host, made current.

    GPUs are dealt one to a rank process; rank threads all have place 0.

    Raises:
        ConfigError: the host has fewer GPUs than ranks.
    """
    if run_on == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if place >= num_gpus:
        raise ConfigError(
            f"rank process {place + 1} of this host needs a GPU of its own, and the host has {num_gpus}; start fewer "
            "ranks, or --ranks threads, which share the first GPU (for checks: they are no faster than one)"
        )
    found = torch.device(run_on, place)
    torch.cuda.set_device(found)
    return found


def is_done_when_called(run_on: str) -> bool:
    """Whether an operation is over when its call returns, so that a clock around the call measures it."""
    return run_on == "cpu"


def finished(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
