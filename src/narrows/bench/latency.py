"""Measures prefill by prompt length and decode steps by batch size, beside what the machine allows in the same round.

A decode step is timed between the tokens of running requests. The bytes that it must read are counted from the experts
that steps of its kind were seen to use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from narrows.bench.engines import RunningVariant, Variant, running_variants
from narrows.bench.interleave import interleave
from narrows.bench.requests import random_prompts, timed
from narrows.bench.results import Outcome, Series
from narrows.bench.roofline import decode_bound, decode_kv_bytes, decode_weight_bytes, prefill_flops
from narrows.bench.routing import ExpertCounter
from narrows.calibrate.rates import CALIBRATION, Calibrator, rates
from narrows.calibrate.statistics import quantile
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.errors import ConfigError
from narrows.instruments.trace_file import TraceFile

__all__ = ["LatencyWork", "latency"]

_OVERLAP = 3
"""Steps at the beginning and end of a run that are not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyWork:
    """Prompts of each of ``prompt_lengths``; decode steps of each of ``batches``, ``steps`` of them, from ``context``
    tokens on."""

    prompt_lengths: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    steps: int
    seed: int = 0

    def max_tokens(self, engine_config: EngineConfig, batch: int) -> int:
        """Tokens per request, so that ``steps`` are left while all run: prompts are spread over several steps."""
        return self.steps + _OVERLAP + -(-batch * self.context // max(1, engine_config.rows_per_step - batch))

    def limits(self, engine_config: EngineConfig) -> EngineConfig:
        """``engine_config`` with room for the works, where it does not say how much."""
        most = max(self.batches, default=0)
        decoded = self.context + self.max_tokens(engine_config, most) + engine_config.page_size if most else 0
        longest = max(self.prompt_lengths, default=0) + engine_config.page_size
        return replace(
            engine_config,
            max_context=engine_config.max_context or max(longest, decoded),
            kv_tokens=engine_config.kv_tokens or max(longest, -(-most // max(engine_config.dp, 1)) * decoded),
        )


@dataclass(frozen=True, slots=True)
class _Prefill:
    length: int

    def __str__(self) -> str:
        return f"prefill {self.length}"


@dataclass(frozen=True, slots=True)
class _Decode:
    batch: int

    def __str__(self) -> str:
        return f"decode, batch {self.batch}"


def latency(
    variants: Sequence[Variant],
    work: LatencyWork,
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    trace: TraceFile | None = None,
) -> Outcome:
    """Seconds of every variant at every work, and the share it reaches of what the machine allowed in that round."""
    roomy = [replace(one, config=work.limits(one.config)) for one in variants]
    works: list[_Prefill | _Decode] = [*map(_Prefill, work.prompt_lengths), *map(_Decode, work.batches)]
    with Calibrator(resolve(roomy[0].config)) as calibrator, running_variants(roomy, trace) as running:
        hits = {(one, batch): _experts_hit(one, work, batch) for one in running for batch in work.batches}
        ways: dict[str, Callable[[], Any]] = {CALIBRATION: calibrator.measure}
        ways |= {f"{kind}, {one.name}": partial(_measure, one, work, kind) for kind in works for one in running}
        found = interleave(ways, rounds=rounds, warmup=warmup, progress=progress)
        resolved = {one.name: one.resolved for one in running}
        evidence = running[0].engine().plans.evidence()
        experts = {(one.name, batch): hit for (one, batch), hit in hits.items()}
    allowed = found[CALIBRATION]
    series = []
    for kind in works:
        values = {name: tuple(found[f"{kind}, {name}"]) for name in resolved}
        facts = {
            name: _facts(
                kind, resolved[name], work, experts.get((name, getattr(kind, "batch", 0)), 0.0), seconds, allowed
            )
            for name, seconds in values.items()
        }
        series.append(
            Series(
                work=str(kind), unit="ms", values={n: tuple(1e3 * s for s in v) for n, v in values.items()}, facts=facts
            )
        )
    return Outcome(
        series=tuple(series),
        calibration=rates(allowed),
        notes=(
            f"decode: the median step of a run from {work.context} tokens of context on",
            "share of roofline: prefill, FLOPs of the whole model at the rate of the GEMM; decode, bytes of the "
            "distinct weights that the step reads at the read bandwidth; both measured in the same round",
            "share of bound: each product of a decode step at the longer of reading its weights, or keys and values, "
            "at the read bandwidth, and of its FLOPs at the rate of the GEMM",
            *filter(None, [evidence]),
        ),
    )


def _measure(one: RunningVariant, work: LatencyWork, kind: _Prefill | _Decode) -> float:
    """Seconds of a prompt, or of the median step."""
    engine, vocab_size = one.engine(), one.resolved.config.vocab_size
    if isinstance(kind, _Prefill):
        return timed(engine, random_prompts(1, kind.length, vocab_size, work.seed), 1).total
    prompts = random_prompts(kind.batch, work.context, vocab_size, work.seed)
    seconds = timed(engine, prompts, work.max_tokens(one.resolved.engine_config, kind.batch)).step_seconds()
    if not seconds:
        raise ConfigError(
            f"batch {kind.batch}: its requests never all ran at once; raise --max-rows or --steps, or lower --batches"
        )
    return quantile(seconds, 0.5)


def _experts_hit(one: RunningVariant, work: LatencyWork, batch: int) -> float:
    """Routed experts, all layers added up, that a decode step of ``batch`` rows sends rows to; 0 without experts."""
    config, engine = one.resolved.config, one.engine()
    engine.instrument(ExpertCounter)
    prompts = random_prompts(batch, work.context, config.vocab_size, work.seed)
    timed(engine, prompts, work.max_tokens(one.resolved.engine_config, batch))
    layers, hit = engine.readings()[0].get(batch, (0, 0))
    engine.instrument(None)
    num_moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    return num_moe * hit / layers if layers else 0.0


def _facts(
    kind: _Prefill | _Decode,
    resolved: Resolved,
    work: LatencyWork,
    experts: float,
    seconds: Sequence[float],
    allowed: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    config, itemsize = resolved.config, resolved.dtype.itemsize
    if isinstance(kind, _Prefill):
        flops = prefill_flops(config, kind.length)
        shares = [flops / s / rate["gemm_flop_per_s"] for s, rate in zip(seconds, allowed, strict=True)]
        return {
            "tok_per_s": kind.length / quantile(seconds, 0.5),
            "gflop": flops / 1e9,
            "share_of_roofline": quantile(shares, 0.5),
        }
    quantization = resolved.engine_config.quantization
    int8 = quantization.startswith("int8")
    weights = decode_weight_bytes(config, itemsize, rows=kind.batch, experts_hit=experts, int8=int8)
    context = decode_kv_bytes(config, itemsize, rows=kind.batch, context=work.context)
    shares = [weights / s / rate["read_bytes_per_s"] for s, rate in zip(seconds, allowed, strict=True)]
    facts = {
        "tok_per_s": kind.batch / quantile(seconds, 0.5),
        "experts_hit": experts,
        "weights_mb": weights / 1e6,
        "kv_mb": context / 1e6,
        "share_of_roofline": quantile(shares, 0.5),
    }
    if quantization == "none":  # others' products have rates of their own, which are not measured
        bound = partial(decode_bound, config, itemsize, rows=kind.batch, context=work.context, experts_hit=experts)
        bounds = [bound(bytes_per_s=rate["read_bytes_per_s"], flop_per_s=rate["gemm_flop_per_s"]) for rate in allowed]
        facts["share_of_bound"] = quantile([bound / s for bound, s in zip(bounds, seconds, strict=True)], 0.5)
    return facts
