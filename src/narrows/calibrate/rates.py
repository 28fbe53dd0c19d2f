"""What this machine allows right now, measured on separate ranks beside an engine: memory reads, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import TracebackType
from typing import Concatenate, ParamSpec

from narrows.calibrate.probe import GEMM_SHAPE, Probe
from narrows.calibrate.statistics import Spread, spread
from narrows.engine.config import Resolved
from narrows.engine.ranks import start_ranks

__all__ = ["CALIBRATION", "Calibrator", "rates"]

CALIBRATION = "calibration"
"""The name under which a calibrator takes turns with variants."""

P = ParamSpec("P")

_READ = 256 << 20
"""Bytes per rank: well beyond the caches."""


class Calibrator:
    """Ranks that measure; as many, and of as many threads, as an engine's. A context manager."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self._ranks = start_ranks(resolved, Probe)

    def measure(self) -> dict[str, float]:
        """Bytes read and FLOP computed per second, all ranks together."""
        size = self.resolved.mesh.size
        read, gemm = self.ask(Probe.read, _READ), self.ask(Probe.gemm, self.resolved.dtype)
        return {"read_bytes_per_s": size * _READ / read, "gemm_flop_per_s": size * 2 * prod(GEMM_SHAPE) / gemm}

    def ask(self, method: Callable[Concatenate[Probe, P], float], *args: P.args, **kwargs: P.kwargs) -> float:
        """Seconds of the slowest rank in one measurement of :class:`Probe`."""
        return max(self._ranks.submit(method, *args, **kwargs).result())

    def join_gloo(self, file: str) -> None:
        """Give the ranks a gloo group of ``torch.distributed`` too."""
        self._ranks.submit(Probe.join_gloo, file).result()

    def __enter__(self) -> Calibrator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ranks.__exit__(kind, error, trace)


def rates(found: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """The rates of all rounds."""
    return {name: spread([one[name] for one in found]) for name in found[0]}
