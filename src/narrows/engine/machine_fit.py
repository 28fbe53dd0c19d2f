"""Ranks and threads for the machine at hand, where the user leaves them open.

Knows cores, GPUs and what meshes a model can be dealt to; starts nothing. On CPUs a rank computes on its own cores and
meets the others in memory, so ranks come first: the largest power of two, at most 8, that the cores and the model
allow. What is left of the cores becomes threads of each rank.
"""

from __future__ import annotations

from narrows.arch.config import ModelConfig
from narrows.arch.forms import check_mesh
from narrows.comm.cores import num_cores
from narrows.comm.device import num_cards
from narrows.comm.launch import Launch
from narrows.errors import ConfigError
from narrows.layout import Mesh

__all__ = ["fit"]

_MOST_RANKS = 8
"""Per group. More were never measured on one host; who has the cores can ask for them."""


def fit(
    config: ModelConfig, *, dp: int, tp: int | None, threads: int | None, on_gpu: bool, launch: Launch | None
) -> tuple[int, int]:
    """Ranks per group and threads per rank; what is not None stays as it is.

    Raises:
        ConfigError: ``tp`` is left open for ranks on several hosts, which have to agree.
    """
    if launch is not None and tp is None:
        raise ConfigError("--tp auto is for ranks on one host: say how many there are, the same on every host")
    if tp is None:
        room = num_cards() if on_gpu else num_cores()
        tp = next((n for n in (8, 4, 2) if n <= _MOST_RANKS and n * dp <= room and _fits(config, dp, n)), 1)
    if threads is None:
        here = len(launch.ranks) if launch is not None and not launch.by_torchrun else max(dp * tp, 1)
        threads = 1 if on_gpu else max(num_cores() // here, 1)
    return tp, threads


def _fits(config: ModelConfig, dp: int, tp: int) -> bool:
    try:
        check_mesh(config, Mesh.of(dp=dp, tp=tp))
    except ConfigError:
        return False
    return True
