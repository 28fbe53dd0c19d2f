"""Peak memory of rank processes over one prefill step, beside what a plan says that it takes.

Measured from outside: the ranks' anonymous memory, and their parts of the segments that they share with each other.
What a rank still shares with the process that forked it counts in full, as if it were alone; the machine holds that
once. Files that processes map, libraries above all, are left out, since other programs map them too. The kernel keeps
each process's peak, so that none is missed. Where it refuses to reset that figure, memory is sampled.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from narrows.cost.memory import MemoryUse
from narrows.cost.pricer import StepShape
from narrows.engine.config import EngineConfig
from narrows.engine.llm import LLM
from narrows.plan.planner import Planner
from narrows.plan.workspace import Workspace
from narrows.ranks.processes import ProcessRanks

__all__ = ["PeakMemory", "peak_memory"]

_INTERVAL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Bytes on the fullest rank. ``tokens``: of KV cache that the step wrote, per attention group."""

    memory: MemoryUse
    workspace: Workspace
    tokens: int
    loaded: int
    peak: int

    @property
    def predicted_loaded(self) -> float:
        return self.memory.process + self.memory.weights

    @property
    def predicted(self) -> float:
        return self.predicted_loaded + self.memory.workspace + self.tokens * self.memory.kv_per_token


def peak_memory(config: EngineConfig, *, rows: int, length: int) -> PeakMemory:
    """Run ``rows`` rows in prompts of ``length`` tokens as one step, and watch.

    Args:
        config: with ranks that are processes of this host.
    """
    prompts = rows // length
    config = replace(
        config,
        ranks="processes",
        rows_per_step=rows,
        max_context=length + config.page_size,
        kv_tokens=-(-prompts // config.dp) * (length + 2 * config.page_size),
    )
    options = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "model"}
    with LLM(config.model, **options) as llm:
        resolved, ranks = llm.resolved, llm.engine.ranks
        assert isinstance(ranks, ProcessRanks)
        pids = tuple(ranks.pids)
        each = [rows // config.dp] * config.dp
        shape = StepShape.of(resolved.mesh, tuple(each), phase="prefill", context=length)
        planner = Planner(resolved.deployment, resolved.sharding)
        plan = planner.plan(shape, config.layout)
        loaded = max(map(_own_bytes, pids))
        with _Watch(pids) as watch:
            most = resolved.config.vocab_size
            llm.generate([[(7 * i + 13 * j) % most for j in range(length)] for i in range(prompts)], max_tokens=1)
    return PeakMemory(
        memory=planner.memory(plan),
        workspace=planner.workspace(plan),
        tokens=each[0],
        loaded=loaded,
        peak=watch.peak,
    )


class _Watch:
    """The most memory that any of some processes has at one time, while the context lasts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak = 0
        self._pids, self._stop = pids, threading.Event()
        self._before: dict[int, _Memory] = {}
        self._thread = threading.Thread(target=self._sample, name="narrows watches memory", daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.peak = max(self.peak, *map(_own_bytes, self._pids))

    def __enter__(self) -> _Watch:
        for pid in self._pids:
            with suppress(OSError):  # a kernel without the feature, or a container that forbids it
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # resets the peak: man 5 proc
                self._before[pid] = _Memory.of(pid)
        self._thread.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, *map(_own_bytes, self._pids))
        for pid, before in self._before.items():
            with suppress(OSError):
                self.peak = max(self.peak, _Memory.of(pid).peak_since(before))


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes of a process, as the kernel counts them. ``others``: what other processes have a part in."""

    own: int
    resident: int
    peak: int
    others: int

    @classmethod
    def of(cls, pid: int) -> _Memory:
        status = _fields(Path(f"/proc/{pid}/status"))
        own = _own_bytes(pid)
        anonymous = status["RssAnon"]
        return cls(own, status["VmRSS"], status["VmHWM"], status["RssFile"] + status["RssShmem"] - (own - anonymous))

    def peak_since(self, before: _Memory) -> int:
        """The most of its own that the process had since ``before``, when its peak was reset.

        The peak counts files and shared memory in full. Both only grow during a step, so their growth is taken off.
        """
        return before.own + (self.peak - before.resident) - (self.others - before.others)


def _own_bytes(pid: int) -> int:
    """Anonymous memory of a process, and its part of what several share."""
    with suppress(OSError):
        fields = _fields(Path(f"/proc/{pid}/smaps_rollup"))
        return fields["Anonymous"] + fields["Pss_Shmem"]
    return 0


def _fields(path: Path) -> dict[str, int]:
    """The sizes in a file of /proc, in bytes, by name."""
    lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {line[0].removesuffix(":"): int(line[1]) << 10 for line in lines if line[-1] == "kB" and len(line) == 3}
