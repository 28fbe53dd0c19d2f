"""Ranks and threads for the machine at hand, where the user leaves them open.

On CPUs a rank computes on its own cores and exchanges through memory, so ranks come first: the largest power of two,
at most 8, that the cores and the model allow. The remaining cores become threads of each rank.
"""

from __future__ import annotations

from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import check_mesh
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.ranks.affinity import num_threads, room
from narrows.ranks.launch import Launch

__all__ = ["fit"]

_CHOICES = (8, 4, 2)
"""Ranks per group, the best first. More were never measured on one host; machines with the cores can ask for them."""


def fit(
    config: ModelConfig, *, dp: int, tp: int | None, threads: int | None, run_on: str, launch: Launch | None
) -> tuple[int, int]:
    """Ranks per group and threads per rank; a value that is not None is kept.

    Processes started by a launcher (``launch``) are one rank each.
    """
    if tp is None and launch is not None:
        tp = launch.world_size // max(dp, 1)
    if tp is None:
        tp = next((n for n in _CHOICES if n * dp <= room(run_on) and _fits(config, dp, n)), 1)
    if threads is None:
        threads = num_threads(run_on, launch.num_local_ranks if launch is not None else max(dp * tp, 1))
    return tp, threads


def _fits(config: ModelConfig, dp: int, tp: int) -> bool:
    try:
        check_mesh(config, Mesh.of(dp=dp, tp=tp))
    except ConfigError:
        return False
    return True
