"""Throughput: some requests of equal lengths handed over at once, until the last has its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from narrows.bench.engines import RunningVariant, Variant, memory_of, running_variants
from narrows.bench.interleave import interleave
from narrows.bench.requests import random_prompts, timed
from narrows.bench.results import Outcome, Series
from narrows.calibrate.statistics import quantile
from narrows.engine.config import EngineConfig
from narrows.instruments.trace_file import TraceFile

__all__ = ["OfflineWork", "offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineWork:
    """``num_requests`` prompts of ``input_length`` random ids, each to ``output_length`` tokens."""

    num_requests: int
    input_length: int
    output_length: int
    seed: int = 0

    def limits(self, config: EngineConfig) -> EngineConfig:
        """``config`` with room for all requests at once, where it does not say how much."""
        each = self.input_length + self.output_length + config.page_size
        return replace(
            config,
            max_context=config.max_context or each,
            kv_tokens=config.kv_tokens or -(-self.num_requests // max(config.dp, 1)) * each,
        )


def offline(
    variants: Sequence[Variant],
    work: OfflineWork,
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    trace: TraceFile | None = None,
) -> Outcome:
    """Output and total tokens per second of every variant, and how long the first token of a request took."""
    with running_variants([replace(one, config=work.limits(one.config)) for one in variants], trace) as running:
        memory: dict[str, int] = {}
        alone = len({id(one.shared) for one in running}) == 1
        ways = {one.name: partial(_run, one, work, memory) for one in running}
        found = interleave(ways, rounds=rounds, warmup=warmup, progress=progress)
        evidence = running[0].engine().plans.evidence()
    name = f"{work.num_requests} x ({work.input_length} in, {work.output_length} out)"
    outputs, inputs = work.num_requests * work.output_length, work.num_requests * work.input_length

    def series(what: str, unit: str, value: Callable[[tuple[float, float]], float]) -> Series:
        values = {variant: tuple(value(one) for one in given) for variant, given in found.items()}
        return Series(work=f"{name}: {what}", unit=unit, values=values)

    memory_note = "memory: PSS of the host process and the ranks right after a run"
    tokens = series("output", "tok/s", lambda one: outputs / one[0])
    facts = {variant: {"memory_mb": memory[variant] / 1e6} for variant in found if alone}
    return Outcome(
        series=(
            replace(tokens, facts=facts),
            series("input and output", "tok/s", lambda one: (inputs + outputs) / one[0]),
            series("median time to the first token", "s", lambda one: one[1]),
        ),
        notes=tuple(filter(None, (memory_note if alone else "", evidence))),
    )


def _run(one: RunningVariant, work: OfflineWork, memory: dict[str, int]) -> tuple[float, float]:
    """(seconds in all, median seconds to a request's first token)."""
    vocab_size = one.resolved.config.vocab_size
    prompts = random_prompts(work.num_requests, work.input_length, vocab_size, work.seed)
    engine = one.engine()
    times = timed(engine, prompts, work.output_length)
    memory[one.name] = max(memory.get(one.name, 0), memory_of(engine))
    return times.total, quantile([tokens[0] for tokens in times.tokens], 0.5)
