"""Measures a machine's prices: which stages over which rows, which collectives of which sizes, and what a step costs
beside its walk; gives a profile.

Knows probes on ranks, engines of few layers, and the tables that prices are looked up in; prints and writes nothing.
Every table is gone through in rounds, so that a slow while of the machine falls on all of them, and the median counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from time import perf_counter
from typing import Any

import torch

from narrows.arch.config import ModelConfig
from narrows.arch.forms import Forms, check_mesh, form_choices
from narrows.arch.presets import load_model_config
from narrows.arch.stages import AttentionCore, PriceClass, Stage, StageKind, Work
from narrows.arch.weights import layer_weights
from narrows.bench.stage_probe import StageProbe, StageWork, spans_of, stages_of
from narrows.bench.statistics import Spread, spread
from narrows.cost.measured import AXES, CollectivePoints, Measured, StagePoint, StagePoints, StepPoints
from narrows.cost.memory import kv_token_bytes
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.profile import StepClock, profile_rows
from narrows.engine.ranks import Ranks, start_ranks
from narrows.errors import ConfigError
from narrows.layout import Mesh, deal
from narrows.sched.batch import Batch, Chunk
from narrows.sched.pages import num_pages_for

__all__ = ["Calibration", "Grid", "calibrate", "figures_of", "meshes_of"]

_COLD = 96 << 20
"""Bytes of weights that a stage should go through before it meets the same ones again: more than most caches."""
_MOST_LAYERS = 4
"""Of each kind."""
_PASS_S, _FEW, _MANY = 0.02, 2, 24
"""A measurement repeats for so many seconds, within so many passes, in every round."""
_CACHE_BYTES = 512 << 20
"""Of KV cache per layer, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured: row counts of stages, of those over rows with logits, contexts, and bytes of collectives."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    logit_rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    decode_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    decode_contexts: tuple[int, ...] = (64, 1024)
    prompt: int = 256
    """Prompts of this length are measured beside one prompt of all rows."""
    nbytes: tuple[int, ...] = tuple(1 << power for power in range(9, 28, 2))
    step_rows: tuple[int, ...] = (1, 8, 64, 512, 2048)
    rounds: int = 2


@dataclass(slots=True)
class Calibration:
    """Tables in the making, and the rates that price what they lack."""

    measured: Measured
    read_bytes_per_s: float
    flop_per_s: float
    seconds: float
    skipped: tuple[str, ...]


Progress = Callable[[str, float], None]
"""What is being measured, and the share of the work that is done."""


def meshes_of(num_ranks: int) -> tuple[Mesh, ...]:
    """Every mesh of dp x tp ranks, that of one attention group first."""
    return tuple(Mesh.of(dp=n, tp=num_ranks // n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)


def calibrate(
    models: Sequence[str],
    asked: EngineConfig,
    *,
    num_ranks: int,
    grid: Grid,
    seconds: float,
    progress: Progress = lambda what, share: None,
) -> Calibration:
    """Measure ``num_ranks`` ranks of this machine on the stages of ``models``.

    ``asked``: what ranks are, their threads, dtype and quantization. ``seconds``: what it should take at most; what is
    dearest is left out when they are over, and is named.

    Raises:
        ConfigError: a model whose layers do not fit this machine, or that the ranks cannot hold.
    """
    begin = perf_counter()
    run = _Run(asked, grid, deadline=begin + seconds, progress=progress)
    configs = {model: load_model_config(model) for model in models}
    jobs = [(mesh, model) for mesh in meshes_of(num_ranks) for model in models if _fits(configs[model], mesh)]
    if not jobs:
        raise ConfigError(
            f"{' and '.join(models)} cannot be dealt to {num_ranks} ranks; name another model, or fewer --ranks"
        )
    exchanged: set[Mesh] = set()
    for number, (mesh, model) in enumerate(jobs):
        run.share = number / len(jobs), 1 / len(jobs)
        run.mesh(mesh, model, exchanges=mesh not in exchanged, rates=number == 0)
        exchanged.add(mesh)
    return run.calibration(perf_counter() - begin)


def _fits(config: ModelConfig, mesh: Mesh) -> bool:
    try:
        check_mesh(config, mesh)
    except ConfigError:
        return False
    return True


Key = tuple[str, tuple[Work, ...], str]
"""Price class, work, and the phase of stages that attend."""


class _Run:
    """Goes through meshes and models, and collects."""

    def __init__(self, asked: EngineConfig, grid: Grid, *, deadline: float, progress: Progress) -> None:
        self.asked, self.grid, self.deadline = asked, grid, deadline
        self.share = 0.0, 1.0
        self._progress = progress
        self._stages: dict[Key, dict[tuple[int, float], list[float]]] = {}
        self._exchanges: dict[tuple[str, int, str], dict[int, list[float]]] = {}
        self._copies: dict[int, list[float]] = {}
        self._steps: dict[str, dict[int, list[float]]] = {}
        self._rates: list[tuple[float, float]] = []
        self._skipped: dict[str, None] = {}
        self._dtype = ""

    # -- one mesh, one model -----------------------------------------------------------------------------------------

    def mesh(self, mesh: Mesh, model: str, *, exchanges: bool, rates: bool) -> None:
        """Measure what is not known yet of ``model`` on ``mesh``."""
        asked = replace(self.asked, model=model, dp=mesh.sizes[0], tp=mesh.sizes[-1], load_format="dummy")
        whole = resolve(asked, Forms())
        small = _few_layers(whole.config, mesh)
        resolved = replace(whole, config=small)
        self._dtype = resolved.deployment.dtype
        num_tokens = self._num_tokens(small, mesh, resolved)
        make = partial(
            StageProbe,
            config=small,
            dtype=resolved.dtype,
            quantization=asked.quantization,
            num_tokens=num_tokens,
            num_positions=max(*self.grid.rows, *self.grid.decode_contexts) + 1,
        )
        with ExitStack() as stack:
            ranks = start_ranks(resolved, make)
            stack.push(ranks.__exit__)
            known = set(self._stages)
            for forms in _forms_to_measure(small, mesh):
                works = list(self._works(small, mesh, forms, num_tokens, known))
                if works:
                    ranks.submit("build", forms).result()
                    self._measure_stages(ranks, works, f"{model} on {mesh}")
            if exchanges:
                self._measure_exchanges(ranks, mesh, resolved.dtype)
            if rates:
                self._measure_rates(ranks, mesh.size, resolved.dtype)
        if exchanges:
            self._measure_steps(small, resolved)

    def _num_tokens(self, config: ModelConfig, mesh: Mesh, resolved: Resolved) -> int:
        """Tokens of KV cache: what the grid needs, within what memory is taken for it."""
        grid = self.grid
        per_token = kv_token_bytes(config, mesh, resolved.dtype.itemsize) / config.num_hidden_layers
        most = int(_CACHE_BYTES / max(per_token, 1))
        wanted = max(grid.rows[-1] + grid.prompt, max(grid.decode_rows) * (max(grid.decode_contexts) + 16))
        return max(min(wanted, most), grid.rows[-1] + grid.prompt)

    def _works(
        self, config: ModelConfig, mesh: Mesh, forms: Forms, num_tokens: int, known: set[Key]
    ) -> Iterator[tuple[Key, float, StageWork]]:
        """Every measurement that is not known: where it is booked, tokens attended per row, and what to run."""
        itemsize = 4 if self._dtype == "fp32" else 2
        seen = set(known)
        for stage in stages_of(config, mesh, forms, itemsize):
            for fused, work in _variants(stage):
                for phase in ("prefill", "decode") if _attends(work) else ("",):
                    key = (str(stage.price_class), work, phase)
                    if key in seen:
                        continue
                    seen.add(key)
                    for rows, context, attended in self._points(stage, phase):
                        if phase == "decode" and rows * (context + 16) > num_tokens:
                            continue
                        yield (
                            key,
                            attended,
                            StageWork(stage.name, fused=fused, rows=rows, phase=phase or "decode", context=context),
                        )

    def _points(self, stage: Stage, phase: str) -> Iterator[tuple[int, int, float]]:
        """(rows, context, tokens attended per row)."""
        grid = self.grid
        if phase == "decode":
            for context in grid.decode_contexts:
                for rows in grid.decode_rows:
                    yield rows, context, float(context)
        elif phase == "prefill":
            for rows in grid.rows:
                yield rows, rows, rows / 2
                if rows > grid.prompt:
                    yield rows, grid.prompt, grid.prompt / 2
        else:
            late = stage.price_class in (PriceClass.LM_HEAD, PriceClass.SAMPLE)
            for rows in grid.logit_rows if late else grid.rows:
                yield rows, 1, 0.0

    def _measure_stages(self, ranks: Ranks, works: list[tuple[Key, float, StageWork]], what: str) -> None:
        works = sorted(works, key=lambda one: one[2].rows)  # the dearest last: time may run out
        for turn in range(self.grid.rounds):
            for number, (key, attended, work) in enumerate(works):
                done = (turn * len(works) + number) / (self.grid.rounds * len(works))
                self._say(f"{what}: {work.name}, {work.rows} rows", 0.8 * done)
                if perf_counter() > self.deadline and (turn or work.rows > 64):
                    if not turn:
                        self._skipped[f"{work.name} beyond {works[max(number - 1, 0)][2].rows} rows ({what})"] = None
                    break
                first = self._slowest(ranks, work, 1)
                passes = min(max(ceil(_PASS_S / max(first[0], 1e-6)), _FEW), _MANY)
                # A first pass that takes long is as good as any; a short one has met cold code and memory.
                again = first if first[0] > 0.5 else self._slowest(ranks, work, passes)
                self._stages.setdefault(key, {}).setdefault((work.rows, attended), []).extend(again)

    def _slowest(self, ranks: Ranks, work: StageWork, passes: int) -> list[float]:
        return [max(one) for one in zip(*ranks.submit("stage", work, passes).result(), strict=True)]

    # -- collectives, copies, rates ----------------------------------------------------------------------------------

    def _measure_exchanges(self, ranks: Ranks, mesh: Mesh, dtype: torch.dtype) -> None:
        for axes in _axes(mesh):
            num = len(mesh.group(0, *axes))
            axis = AXES[0] if axes[1] == mesh.num_axes or mesh.sizes[-1] == 1 else AXES[1]
            for op in ("all_reduce", "reduce_scatter", "all_gather", "column_gather"):
                table = self._exchanges.setdefault((op, num, axis), {})
                if table:
                    continue  # such groups of another mesh
                for _ in range(self.grid.rounds + 1):
                    for nbytes in self.grid.nbytes:
                        self._say(f"{op} among {num} of {mesh}, {nbytes} bytes", 0.85)
                        repeats = min(max((4 << 20) // nbytes, 1), 50)
                        args = ("exchange", op, axes, nbytes, dtype, repeats)
                        table.setdefault(nbytes, []).append(max(ranks.submit("ask", *args).result()))
        if not self._copies:
            for _ in range(self.grid.rounds + 1):
                for nbytes in self.grid.nbytes:
                    args = ("add", nbytes, min(max((4 << 20) // nbytes, 2), 50))
                    self._copies.setdefault(nbytes, []).append(max(ranks.submit("ask", *args).result()))

    def _measure_rates(self, ranks: Ranks, num_ranks: int, dtype: torch.dtype) -> None:
        self._say("memory and products", 0.9)
        nbytes, flop = 256 << 20, 2 * 2048 * 4096 * 2048
        for _ in range(self.grid.rounds):
            read = max(ranks.submit("ask", "read", nbytes).result())
            gemm = max(ranks.submit("ask", "gemm", dtype).result())
            self._rates.append((nbytes / read, flop / gemm))

    # -- what a step costs beside its walk ---------------------------------------------------------------------------

    def _measure_steps(self, small: ModelConfig, resolved: Resolved) -> None:
        if self._steps:
            return
        grid = self.grid
        rows = [n for n in grid.step_rows if n <= grid.rows[-1]]
        pages = max(max(rows), 64 * 80) // resolved.limits.page_size + 64
        limits = replace(resolved.limits, max_context=max(rows) + 64, rows_per_step=max(rows), pages_per_group=pages)
        few = replace(resolved, config=small, limits=limits, deployment=replace(resolved.deployment, config=small))
        with Engine(few) as engine:
            engine.use_layout("all-reduce")
            for _ in range(grid.rounds):
                for phase in ("decode", "prefill"):
                    for number in rows:
                        if phase == "decode" and number > 64:
                            continue
                        self._say(f"steps: {phase}, {number} rows", 0.95)
                        found = _beside_the_walk(engine, _step_batch(few, number, phase))
                        self._steps.setdefault(phase, {}).setdefault(number, []).append(found)

    # -- the result --------------------------------------------------------------------------------------------------

    def calibration(self, seconds: float) -> Calibration:
        """Everything measured, as tables."""
        stages = tuple(
            StagePoints(
                price_class=price_class,
                work=work,
                dtype=self._dtype,
                phase=phase,
                points=tuple(
                    StagePoint(rows=rows, attended=attended, seconds=found.median, spread=_width(found))
                    for (rows, attended), found in sorted((at, spread(s)) for at, s in points.items())
                ),
            )
            for (price_class, work, phase), points in self._stages.items()
        )
        collectives = tuple(
            CollectivePoints(op=op, num_ranks=num, axis=axis, points=points, spreads=spreads)
            for (op, num, axis), table in self._exchanges.items()
            for points, spreads in [_table(table)]
        )
        steps = tuple(
            StepPoints(phase=phase, points=points, spreads=spreads)
            for phase, table in self._steps.items()
            for points, spreads in [_table(table)]
        )
        return Calibration(
            measured=Measured(
                stages=stages,
                collectives=collectives,
                copies=_table(self._copies)[0] if self._copies else (),
                steps=steps,
            ),
            read_bytes_per_s=max(read for read, _ in self._rates),
            flop_per_s=max(gemm for _, gemm in self._rates),
            seconds=seconds,
            skipped=tuple(self._skipped),
        )

    def _say(self, what: str, share: float) -> None:
        begin, length = self.share
        self._progress(what, begin + share * length)


def _table(found: dict[int, list[float]]) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    spreads = [(size, spread(seconds)) for size, seconds in sorted(found.items())]
    return tuple((size, each.median) for size, each in spreads), tuple(_width(each) for _, each in spreads)


def _width(found: Spread) -> float:
    return (found.p90 - found.p10) / found.median


def _attends(work: tuple[Work, ...]) -> bool:
    return any(isinstance(item, AttentionCore) for item in work)


def _variants(stage: Stage) -> tuple[tuple[bool, tuple[Work, ...]], ...]:
    """(fused with the add, its work): a norm runs either way."""
    if stage.kind is StageKind.NORM:
        return (True, stage.work), (False, stage.plain_work)
    return ((False, stage.work),)


def _forms_to_measure(config: ModelConfig, mesh: Mesh) -> tuple[Forms, ...]:
    """The published forms, and those that differ from them in everything: each alternative of a stage is in one."""
    choices = form_choices(config, mesh)
    return tuple(dict.fromkeys((choices[0], choices[-1])))


def _axes(mesh: Mesh) -> tuple[tuple[int, int], ...]:
    """(first, last) of every run of axes along which more than one rank lies, each group of ranks once."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for first in range(mesh.num_axes):
        for last in range(first + 1, mesh.num_axes + 1):
            ranks = mesh.group(0, first, last)
            if len(ranks) > 1:
                found.setdefault(ranks, (first, last))
    return tuple(found.values())


def _few_layers(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """``config`` with as many layers of each kind as its ranks need to find their weights in memory, not in caches."""
    sizes = []
    for layer in dict.fromkeys((0, config.num_hidden_layers - 1)):
        weights = layer_weights(config, mesh, Forms(), layer).values()
        sizes.append(2 * sum(weight.num_values(mesh, 0) for weight in weights if "experts" not in weight.name))
    each = min(max(ceil(_COLD / (mesh.size * max(min(sizes), 1))), 1), _MOST_LAYERS)
    moe = config.moe
    if moe is None:
        return replace(config, num_hidden_layers=each)
    dense = each if config.is_moe_layer(config.num_hidden_layers - 1) and moe.first_k_dense_replace else 0
    return replace(config, num_hidden_layers=dense + each, moe=replace(moe, first_k_dense_replace=dense))


def _step_batch(resolved: Resolved, rows: int, phase: str) -> Batch:
    """A step of ``rows`` rows, spread over the groups: sequences of 64 tokens in decode, else one prompt per group."""
    page, groups = resolved.limits.page_size, []
    for number in deal(rows, resolved.mesh.num_groups):
        chunks, first = [], 1
        for at, (start, length) in enumerate(spans_of(number, phase, 64 if phase == "decode" else max(number, 1))):
            num_pages = num_pages_for(start + length, page)
            pages = tuple(range(first, first + num_pages))
            chunks.append(Chunk(request=at, start=start, tokens=(1,) * length, pages=pages, num_logits=1))
            first += num_pages
        groups.append(tuple(chunks))
    return Batch(groups=tuple(groups))


def _beside_the_walk(engine: Engine, batch: Batch) -> float:
    """Seconds of a step, handed out one ahead as an engine does, less the seconds of the steps of its plan."""
    plan, repeats = engine.plan_for(batch), 12

    def run() -> float:
        start, waiting = perf_counter(), []
        for _ in range(repeats):
            waiting.append(engine.ranks.submit("step", batch, plan, False))
            if len(waiting) == 2:
                waiting.pop(0).result()
        waiting.pop().result()
        return (perf_counter() - start) / repeats

    engine.instrument(None)
    run()
    whole = run()
    engine.instrument(StepClock)
    run()
    engine.readings()
    run()
    walked = sum(row.seconds for row in profile_rows(engine.readings())) / repeats
    return max(whole - walked, 1e-6)


def figures_of(found: Calibration, *, num_ranks: int, memory_bytes: float) -> dict[str, Any]:
    """Fields of a device from the rates: what prices works that no table has."""
    smallest = min(point.seconds for stage in found.measured.stages for point in stage.points)
    return {
        "tflops_bf16": round(found.flop_per_s / 1e12, 4),
        "hbm_bytes_per_s": round(found.read_bytes_per_s),
        "memory_bytes": round(memory_bytes / num_ranks),
        "launch_s": round(smallest, 8),
        "gemm_launch_s": round(smallest, 8),
    }
