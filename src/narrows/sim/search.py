"""Compares meshes and layouts under one load and a latency target: which is best, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import check_mesh
from narrows.cost.memory import MemoryUse
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.sim.engine import Outcome
from narrows.workload.figures import Answer, percentile

__all__ = ["Candidate", "Target", "meshes", "ranked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Target latencies, in seconds (None: any). ``quantile``: the share of requests, in %, that must meet
    each of them."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    quantile: float = 99.0

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def met_by(self, answer: Answer) -> bool:
        """Whether one request was answered within the target."""
        if answer.error:
            return False
        tpot_s = answer.tpot_s
        return (self.ttft_s is None or answer.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s
        )

    def goodput(self, outcome: Outcome) -> float:
        """Requests per second that were answered within the target."""
        if not outcome.figures.duration_s:
            return 0.0
        return sum(map(self.met_by, outcome.answers)) / outcome.figures.duration_s

    def reached(self, outcome: Outcome) -> tuple[float, float]:
        """TTFT and TPOT, in seconds, that the share of requests was answered within; NaN where none has any."""
        done = [answer for answer in outcome.answers if not answer.error]
        tpots = [tpot for answer in done if (tpot := answer.tpot_s) is not None]
        both = ([answer.ttft_s for answer in done], tpots)
        ttft_s, tpot_s = (percentile(sorted(found), self.quantile) if found else math.nan for found in both)
        return ttft_s, tpot_s

    def misses(self, outcome: Outcome) -> tuple[str, ...]:
        """What is missed and by how much, in words; empty: all is met."""
        words = []
        for name, most, found in zip(("TTFT", "TPOT"), (self.ttft_s, self.tpot_s), self.reached(outcome), strict=True):
            if most is not None and found > most:
                words.append(f"misses {name} by {100 * (found / most - 1):.1f} %")
        if outcome.figures.failed:
            words.append(f"{outcome.figures.failed} requests can never run")
        return tuple(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One mesh under one layout: its outcome, or in ``refusal`` why it has none."""

    mesh: Mesh
    layout: str
    dtype: str
    outcome: Outcome | None = None
    refusal: str = ""
    sharding: str = ""
    kv_tokens: int = 0
    """Tokens of KV cache per attention group."""
    memory: MemoryUse | None = None
    notes: tuple[str, ...] = ()
    """What prices of it rest on, for people; empty lines say nothing."""


def meshes(config: ModelConfig, num_ranks: int) -> tuple[Mesh, ...]:
    """Every dp x tp of so many ranks that the model can be split over, attention groups fewest first.

    Raises:
        ConfigError: there is none.
    """
    found, refusal = [], ""
    for dp in range(1, num_ranks + 1):
        if num_ranks % dp:
            continue
        mesh = Mesh.of(dp=dp, tp=num_ranks // dp)
        try:
            check_mesh(config, mesh)
        except ConfigError as error:
            refusal = str(error)
        else:
            found.append(mesh)
    if not found:
        raise ConfigError(refusal or f"--num-gpus {num_ranks}: at least 1 rank is needed")
    return tuple(found)


def ranked(candidates: Sequence[Candidate], target: Target) -> tuple[Candidate, ...]:
    """The best first: those that meet the target before those that miss it, then by goodput, output tokens per second,
    and mean time per request; those that cannot run last. Equal ones stay in their order."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        outcome = candidate.outcome
        if outcome is None:
            return (2.0,)
        goodput = target.goodput(outcome) if target.is_set else 0.0
        found = outcome.figures
        return bool(target.misses(outcome)), -goodput, -found.output_throughput, found.e2e_ms.mean

    return tuple(sorted(candidates, key=key))
