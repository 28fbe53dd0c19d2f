"""One rank that times the stages of a model of few layers, each over so many rows. Runs on ranks, for `profiling.py`.

Knows a model's methods, the fields that they read, and clocks; no plan and no price. A stage is timed on the weights of
all layers in turn, so that they come from memory, as they do in a whole model; all ranks start together, and the
slowest counts, so that ranks which share cores pay for it here as they do in an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig
from narrows.arch.forms import Forms
from narrows.arch.stages import Chain, Field, Stage, StageKind
from narrows.arch.weights import Weight
from narrows.bench.probe import Probe
from narrows.comm.device import finished
from narrows.comm.world import World
from narrows.layout import Mesh
from narrows.models.parts import Decoder, DecoderLayer, Place, StepInputs
from narrows.models.registry import build_model
from narrows.ops.int8 import Quantization
from narrows.ops.paged import build_paged_rows
from narrows.sched.pages import num_pages_for

__all__ = ["PooledWeights", "StageProbe", "StageWork", "spans_of", "stages_of"]

_PAGE = 16
_POOL = 1 << 20


class PooledWeights:
    """Random weights cut from one pool of numbers: as good as any where only time counts, and quickly there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        """A tensor of the weight's shape, or of this rank's slice of it."""
        shape = list(weight.shape)
        if span is not None:
            shape[weight.dim or 0] = span[1] - span[0]
        num = 1
        for size in shape:
            num *= size
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        first = (expert or 0) * 7919 % 4096
        values = (self._pool * scale).to(self._dtype)[first:].repeat(-(-num // (_POOL - first)))
        return values[:num].reshape(shape)


class StageWork:
    """What one measurement computes: a stage by name, fused with the add or not, over rows of a phase and context."""

    __slots__ = ("context", "fused", "name", "phase", "rows")

    def __init__(self, name: str, *, fused: bool, rows: int, phase: str, context: int) -> None:
        self.name, self.fused, self.rows, self.phase, self.context = name, fused, rows, phase, context


def spans_of(rows: int, phase: str, context: int) -> list[tuple[int, int]]:
    """(first position, rows) of each sequence of a step: of one row each in ``decode``, else whole prompts of
    ``context`` tokens, or the last rows of one.

    >>> spans_of(2, "decode", 10), spans_of(5, "prefill", 2), spans_of(3, "prefill", 10)
    ([(9, 1), (9, 1)], [(0, 2), (0, 2), (0, 1)], [(7, 3)])
    """
    if phase == "decode":
        return [(context - 1, 1)] * rows
    if rows < context:
        return [(context - rows, rows)]
    return [(0, min(context, rows - at)) for at in range(0, rows, context)]


def stages_of(config: ModelConfig, mesh: Mesh, forms: Forms, itemsize: int) -> tuple[Stage, ...]:
    """Every stage that a plan of this model may run, once, whether whole rows of logits are asked for or not."""
    found: dict[str, Stage] = {}
    for want_logits in (False, True):
        chain = build_chain(config, mesh, forms, itemsize=itemsize, want_logits=want_logits)
        for group in (chain.prologue, *(kind.stages for kind in chain.layer_types), chain.epilogue):
            found |= {stage.name: stage for stage in group}
    return tuple(found.values())


class StageProbe:
    """One rank's part in measuring stages; every method is called on all ranks together."""

    def __init__(
        self,
        world: World,
        *,
        config: ModelConfig,
        dtype: torch.dtype,
        quantization: str,
        num_tokens: int,
        num_positions: int,
    ) -> None:
        self.world, self.config, self.dtype = world, config, dtype
        self.probe = Probe(world)
        self._quantization = Quantization(quantization)
        self._num_tokens, self._num_positions = num_tokens, num_positions
        self._ranks = tuple(range(world.mesh.size))
        self.model: Decoder
        self.chain: Chain
        self._stages: tuple[Stage, ...] = ()
        self._moe: DecoderLayer | None

    def build(self, forms: Forms) -> None:
        """Hold weights in these forms from now on."""
        place = Place(
            mesh=self.world.mesh,
            rank=self.world.rank,
            forms=forms,
            dtype=self.dtype,
            device=self.world.device,
            num_slots=self._num_tokens + _PAGE,
            num_positions=self._num_positions,
            quantization=self._quantization,
        )
        self.chain = build_chain(self.config, self.world.mesh, forms, itemsize=self.dtype.itemsize)
        self._stages = stages_of(self.config, self.world.mesh, forms, self.dtype.itemsize)
        self.model = build_model(self.config, PooledWeights(self.dtype), place)
        self._moe = next((layer for i, layer in enumerate(self.model.layers) if self.config.is_moe_layer(i)), None)

    def stage(self, work: StageWork, passes: int) -> list[float]:
        """Seconds of the stage, once per pass over all layers that have it: the mean of those layers."""
        stage = next(each for each in self._stages if each.name == work.name)
        with torch.inference_mode():
            step, reads, out = self._inputs(work), self._reads(stage, work), self._out(stage, work)
            calls = [partial(method, step, *reads, **out) for method in self._methods(stage)]
            return [self._once(calls) for _ in range(passes)]

    def ask(self, method: str, *args: Any) -> float:
        """A measurement of :class:`Probe` on the same ranks."""
        seconds: float = getattr(self.probe, method)(*args)
        return seconds

    def _once(self, calls: list[Callable[[], object]]) -> float:
        self.world.barrier(self._ranks, "calibrate")
        start = perf_counter()
        for call in calls:
            call()
        finished(self.world.device)
        return (perf_counter() - start) / len(calls)

    def _methods(self, stage: Stage) -> list[Callable[..., object]]:
        """The stage as every layer that has it computes it, or as the model does."""
        own = [
            getattr(layer, stage.name)
            for i, layer in enumerate(self.model.layers)
            if any(each.name == stage.name for each in self.chain.layer_types[self.chain.layers[i]].stages)
        ]
        return own or [getattr(self.model, stage.name)]

    def _inputs(self, work: StageWork) -> StepInputs:
        spans, first = [], 1
        for start, rows in spans_of(work.rows, work.phase, work.context):
            num_pages = num_pages_for(start + rows, _PAGE)
            spans.append((start, rows, range(first, first + num_pages)))
            first += num_pages
        return self.model.begin_step(
            build_paged_rows([(s, n, tuple(p)) for s, n, p in spans], _PAGE, self.world.device)
        )

    def _reads(self, stage: Stage, work: StageWork) -> list[Tensor]:
        names = [n for n in stage.reads if n != "residual" or work.fused or stage.kind is not StageKind.NORM]
        return [self._field(self.chain.fields[name], stage, work.rows) for name in names]

    def _field(self, field: Field, stage: Stage, rows: int) -> Tensor:
        """A field as the stage reads it; the same on every rank that would hold the same rows."""
        generator, device = torch.Generator().manual_seed(rows), self.world.device
        if field.name == "ids":
            return torch.randint(0, self.config.vocab_size, (rows, 1), generator=generator).to(device)
        if field.name in ("topk_ids", "topk_weights"):
            assert self._moe is not None
            hidden = self._random(rows, self.config.hidden_size, generator)
            ids, weights = self._moe.router(None, hidden)  # type: ignore[attr-defined]
            return ids if field.name == "topk_ids" else weights
        cut = stage.accepts is not None and stage.accepts.holds_columns
        if field.name == "candidates":
            logits = self._random(rows, self.chain.fields["logits"].columns[self.world.rank], generator)
            return self.model.shard_argmax(None, logits).repeat(1, self.world.mesh.size)  # type: ignore[arg-type]
        columns = field.columns * (self.world.mesh.size // max(len(field.columns), 1))
        return self._random(rows, columns[self.world.rank] if cut else field.width, generator)

    def _random(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(self.world.device, self.dtype)

    def _out(self, stage: Stage, work: StageWork) -> dict[str, Tensor]:
        """Where a stage that leaves a sum writes it: memory that is used again and again, as a send buffer is."""
        if stage.leaves is None or not stage.leaves.owes_sum:
            return {}
        width = self.chain.fields[stage.writes[0]].width
        return {"out": torch.empty(work.rows, width, dtype=self.dtype, device=self.world.device)}
