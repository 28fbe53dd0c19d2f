"""Every collective by size, beside the copying that it cannot avoid, and beside other transports."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from narrows.bench.interleave import interleave
from narrows.bench.results import Outcome, Series
from narrows.calibrate.probe import PROBED_COLLECTIVES, Probe
from narrows.calibrate.rates import Calibrator
from narrows.calibrate.statistics import ratios
from narrows.engine.config import EngineConfig, resolve
from narrows.errors import ConfigError

__all__ = ["OTHERS", "CollectivesWork", "collectives", "must_copy"]

OTHERS = ("gloo", "threads")
"""What the ranks' own communicator can be compared with: torch.distributed's gloo functions, and ranks as threads."""

_MEMCPY = "memcpy"
_AT_ONCE = 8 << 20
_MOST_REPEATS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesWork:
    """Tensors of each of ``sizes`` bytes in all, in ``dtype``."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def must_copy(op: str, nbytes: int, size: int) -> int:
    """Bytes of the memcpy that reads and writes as much as one rank must for a collective over ``size`` ranks.

    A reduce-scatter reads its rows of every rank's addend, ``n`` bytes in all, and writes ``n / size``; a gather reads
    ``n`` and writes ``n``; an all-reduce is the first, and reads and writes the rows of the others after it.
    """
    reduced = nbytes + nbytes // size
    if op == "reduce_scatter":
        return reduced // 2
    if op == "all_gather":
        return nbytes
    return (reduced + 2 * (nbytes - nbytes // size)) // 2


def collectives(
    config: EngineConfig,
    work: CollectivesWork,
    against: Sequence[str],
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Microseconds of every collective at every size, per transport; and how often a memcpy's time that is."""
    mesh = resolve(config).mesh
    if mesh.size < 2:
        raise ConfigError("one rank has no other to exchange with: give --tp 2, or --dp 2, or more")
    unknown = [name for name in against if name not in OTHERS]
    if unknown:
        raise ConfigError(f"--against {unknown[0]!r} is not known; transports: {', '.join(OTHERS)}")
    if "gloo" in against and config.ranks != "processes":
        raise ConfigError("gloo groups are among processes: compare with them under --ranks processes")
    own = f"ranks as {config.ranks}"
    with ExitStack() as stack:
        comms = {own: stack.enter_context(Calibrator(resolve(config)))}
        if "threads" in against and config.ranks != "threads":
            comms["ranks as threads"] = stack.enter_context(Calibrator(resolve(replace(config, ranks="threads"))))
        if "gloo" in against:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            comms[own].join_gloo(str(Path(folder) / "meeting"))
        series = []
        for nbytes in work.sizes:
            repeats = min(max(_AT_ONCE // nbytes, 1), _MOST_REPEATS)
            for op in PROBED_COLLECTIVES:
                ways: dict[str, Callable[[], float]] = {
                    name: partial(comm.ask, Probe.collective, op, nbytes, work.dtype, repeats)
                    for name, comm in comms.items()
                }
                if "gloo" in against:
                    ways["gloo"] = partial(comms[own].ask, Probe.gloo, op, nbytes, work.dtype, repeats)
                ways[_MEMCPY] = partial(comms[own].ask, Probe.copy, must_copy(op, nbytes, mesh.size), repeats)
                found = interleave(ways, rounds=rounds, warmup=warmup, progress=lambda line: None)
                progress(f"{op}, {_size(nbytes)}")
                series.append(_series(f"{op}, {_size(nbytes)}", found))
    return Outcome(
        series=tuple(series),
        notes=(
            f"{str(work.dtype).removeprefix('torch.')}, {mesh.size} ranks; the mean of as many calls in a row as move "
            f"8 MB (at most {_MOST_REPEATS}), of the slowest rank",
            "memcpy: of as many bytes as the collective must read and write on a rank, on all ranks together",
        ),
    )


def _series(work: str, found: dict[str, list[float]]) -> Series:
    memcpy = found.pop(_MEMCPY)
    return Series(
        work=work,
        unit="us",
        values={name: tuple(1e6 * s for s in seconds) for name, seconds in found.items()},
        facts={
            name: {
                "memcpy_us": 1e6 * ratios(memcpy, [1.0] * len(memcpy)).median,
                "times_memcpy": ratios(seconds, memcpy).median,
            }
            for name, seconds in found.items()
        },
    )


def _size(nbytes: int) -> str:
    """
    >>> _size(2048), _size(2 << 20)
    ('2 KiB', '2 MiB')
    """
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 and not nbytes % (1 << 20) else f"{nbytes / 1024:g} KiB"
