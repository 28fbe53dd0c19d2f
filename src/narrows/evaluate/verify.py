"""The proof that layouts agree: the same batches under every layout, against one rank, stage by stage; or against
transformers, logit by logit.

One rank runs a fixed sequence of steps (prefill in chunks, prefill mixed with decode, decode, steps that leave groups
without rows) and keeps every stage's output. Each layout then runs the same steps, fed the same tokens, and is
compared: every stage's output, put together from all ranks by its layout (in as many copies as ranks hold the same
rows), and at the end each rank's logits. The first stage whose output differs by more than the tolerance is named, and
the rank where one rank holds the wrong row. A plan that encodes rows rounds on purpose: it has its own tolerance,
and what ranks hold in common must be the same bits. So do int8 weights, whose scales are those of the part that a rank
holds.

A near-tie in the choice of experts falls either way in the last bit, and then everything after it differs. So the one
rank's choice is replayed, with the weights of this run, and rows where this run would have chosen otherwise are
reported apart, with their margin.

Ranks that are processes share no memory with the recorder: of them the logits alone are compared, and their own choice
of experts stands.

What all layouts do alike (a field of the config that is misread, a wrong constant in an operation) shows in none of
these comparisons. So the reference may be an outside one: transformers runs the steps, its greedy tokens are fed, and
its logits and its choice of experts take the place of the one rank's. It keeps no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrows.arch.config import ModelConfig
from narrows.arch.stages import RowSet
from narrows.arch.weight_sharding import WeightSharding
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.worker import StepResult, logit_split
from narrows.errors import ConfigError, PlanError
from narrows.evaluate.recorder import Copy, Flip, Recorder, Spot
from narrows.evaluate.transformers_model import TransformersModel
from narrows.evaluate.verify_batches import VerifyBatches
from narrows.layout import Encoding, RowSplit
from narrows.plan.named import NAMED_LAYOUTS, applicable_layouts, inapplicable, named_layout
from narrows.plan.plan import Plan
from narrows.sched.batch import Batch
from narrows.weights.source import WeightSource

__all__ = ["ENCODED_TOLERANCE", "TOLERANCE", "Difference", "LayoutReport", "VerifyReport", "verify"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Largest root mean square of a stage's difference, relative to the root mean square of its output."""

ENCODED_TOLERANCE = {Encoding.INT8: 0.1, Encoding.FP8: 0.3}
"""The same from the first step on whose plan encodes rows before a gather: what was measured on random tiny models of
every family (docs/encoded-rows.md), with a margin of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A stage's output that differs: by ``relative`` (see TOLERANCE), by ``largest`` in one value, first in ``row``."""

    step: int
    spot: Spot
    relative: float
    largest: float
    row: int
    rank: int | None = None
    """The rank that holds the wrong row; None where several ranks made it together."""
    between_ranks: bool = False
    """Not against one rank: two ranks hold other bits of a row."""

    def __str__(self) -> str:
        on = "" if self.rank is None else f" on rank {self.rank}"
        return (
            f"{self.spot} differs {'between ranks ' if self.between_ranks else ''}by {self.relative:.1e} of its size "
            f"(largest {self.largest:.1e}, first in row {self.row}{on} of step {self.step})"
        )


@dataclass(slots=True, kw_only=True)
class LayoutReport:
    """One layout against one rank. ``failure`` is one line, empty when all is well.

    Differences of logits are absolute, and ``largest_at`` is where the largest is: the prompt's number and the position
    in it, both from 0. ``kl`` is the mean KL divergence per row in nats; ``agreement`` the share of
    rows whose greedy token is the same; ``worst`` the largest relative difference of any stage; ``tolerance`` is the
    last step's, and ``encodings`` what rows travelled as where they were not plain.
    """

    layout: str
    sharding: str
    tolerance: float
    encodings: frozenset[Encoding] = frozenset()
    num_rows: int = 0
    max_logit_difference: float = 0.0
    largest_at: tuple[int, int] | None = None
    mean_logit_difference: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    worst: float = 0.0
    flips: list[Flip] = field(default_factory=list)
    first_difference: Difference | None = None
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """All layouts that were run, and those that do not apply with the reason."""

    resolved: Resolved
    tolerance: float
    num_steps: int
    layouts: tuple[LayoutReport, ...]
    skipped: dict[str, str]
    outside: bool = False
    """Whether the reference was transformers; then no stages were compared."""

    @property
    def own_experts(self) -> bool:
        """Whether no stage was compared and no choice of experts replayed, since ranks were processes."""
        return self.resolved.engine_config.ranks != "threads"

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.layouts)


def _tolerance(resolved: Resolved) -> float:
    rounded = ENCODED_TOLERANCE[Encoding.INT8] if resolved.engine_config.quantization != "none" else 0.0
    return max(TOLERANCE[resolved.dtype], rounded)


def verify(
    engine_config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_decode: int = 8,
    layouts: Sequence[str] = (),
    source: WeightSource | None = None,
    outside: Callable[[ModelConfig], TransformersModel] | None = None,
    tamper: Callable[[Plan], Plan] | None = None,
    validate: bool = True,
) -> VerifyReport:
    """Run ``prompts`` (token ids) under every layout that applies to ``engine_config``'s mesh, against one rank.

    Args:
        engine_config: model, mesh and dtype; its layout is not used.
        num_decode: steps after the prompts.
        layouts: names to run instead of all that apply.
        source: weights, if not those of ``engine_config.model``.
        outside: loads the model of transformers that takes the one rank's place; it is released before ranks load.
        tamper, validate: for tests that plant a fault: change each plan before it runs, and run it unchecked.

    Raises:
        ConfigError: a model or mesh that cannot be, or a layout that cannot apply.
    """
    engine_config = replace(engine_config, want_logits=True, layout="auto")
    verify_batches = VerifyBatches(
        prompts, num_groups=engine_config.dp, num_steps=num_decode, page_size=engine_config.page_size, few_logits=True
    )
    engine_config = replace(engine_config, max_context=verify_batches.max_context, kv_tokens=verify_batches.kv_tokens)
    sharded = resolve(engine_config)
    names = tuple(layouts) or applicable_layouts(sharded.config, sharded.mesh)
    by_sharding: dict[WeightSharding, list[str]] = {}
    for name in names:
        rules = named_layout(name, sharded.config, sharded.mesh)
        by_sharding.setdefault(rules.sharding or sharded.sharding, []).append(name)

    if outside is None:
        reference = _one_rank(engine_config, verify_batches, source)
    else:
        reference = _outside(sharded.config, outside(sharded.config), prompts, verify_batches)
    reports: dict[str, LayoutReport] = {}
    for sharding, group in by_sharding.items():
        recorder = Recorder(sharded.mesh.size, replay=reference.routing) if engine_config.ranks == "threads" else None
        wrap = recorder.wrap if recorder else None
        with Engine(resolve(engine_config, sharding), source=source, wrap=wrap, validate=validate) as engine:
            for name in group:
                reports[name] = _run_layout(engine, name, reference, recorder, tamper, validate)
    return VerifyReport(
        resolved=sharded,
        tolerance=_tolerance(sharded),
        num_steps=len(reference.batches),
        layouts=tuple(reports[name] for name in names),
        skipped={name: why for name in NAMED_LAYOUTS if (why := inapplicable(name, sharded.config, sharded.mesh))},
        outside=outside is not None,
    )


@dataclass(slots=True)
class _Reference:
    """The run that others are compared with: its batches, and of each batch every stage's output and the
    logits; and the experts it chose, by (step, layer). ``outside``: it was no run of an engine."""

    batches: list[Batch] = field(default_factory=list)
    tensors: list[dict[Spot, Copy]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    routing: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outside: bool = False


def _one_rank(engine_config: EngineConfig, verify_batches: VerifyBatches, source: WeightSource | None) -> _Reference:
    kv_tokens = verify_batches.kv_tokens * engine_config.dp
    # Rows are selected before the head: up to there every layout's outputs can be compared, and replayed.
    one = resolve(replace(engine_config, dp=1, tp=1, kv_tokens=kv_tokens, ranks="threads", layout="all-reduce"))
    recorder = Recorder(1)
    reference = _Reference(routing=recorder.routing)
    with Engine(one, source=source, wrap=recorder.wrap) as engine:
        for step, batch in enumerate(verify_batches):
            merged = verify_batches.merged(batch)
            recorder.begin(step)
            (result,) = engine.submit(merged, keep_logits=True).result()
            assert result.logits is not None
            verify_batches.sampled(batch, result.ids)
            reference.batches.append(batch)
            copies = recorder.copies(*_splits(one, merged))
            reference.tensors.append({spot: copy for spot, (copy,) in copies.items()})
            reference.logits.append(result.logits)
    return reference


def _outside(
    config: ModelConfig, model: TransformersModel, prompts: Sequence[Sequence[int]], verify_batches: VerifyBatches
) -> _Reference:
    reference = _Reference(outside=True)
    model.begin(prompts)
    for step, batch in enumerate(verify_batches):
        result = model.step(batch)
        _check_routing(config, result.routing)
        verify_batches.sampled(batch, tuple(result.logits.argmax(-1).tolist()))
        reference.batches.append(batch)
        reference.tensors.append({})
        reference.logits.append(result.logits)
        reference.routing |= {(step, layer): ids_TK for layer, ids_TK in result.routing.items()}
    return reference


def _check_routing(config: ModelConfig, routing: Mapping[int, Tensor]) -> None:
    """Refuse impossible replays: both must have routed experts in the same layers, and as many for a row."""
    top_k = config.moe.num_experts_per_tok if config.moe else 0
    here = {layer: top_k for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)}
    there = {layer: ids_TK.shape[-1] for layer, ids_TK in routing.items()}
    for layer in sorted(here.keys() | there.keys()):
        if here.get(layer) != there.get(layer):
            raise ConfigError(
                f"{config.name}: a row goes to {there.get(layer, 0)} routed experts in layer {layer} of transformers' "
                f"model, and to {here.get(layer, 0)} here: the two read config.json differently"
            )


def _run_layout(
    engine: Engine,
    name: str,
    reference: _Reference,
    recorder: Recorder | None,
    tamper: Callable[[Plan], Plan] | None,
    validate: bool,
) -> LayoutReport:
    resolved, cache = engine.resolved, engine.plans.cache_of(name)
    report = LayoutReport(layout=name, sharding=str(resolved.sharding), tolerance=_tolerance(resolved))
    if recorder is not None:
        recorder.flips = report.flips
    for step, batch in enumerate(reference.batches):
        plan = cache.plan_for(batch)
        plan = tamper(plan) if tamper else plan
        if validate:
            try:
                plan.validate()
            except PlanError as error:
                report.failure = f"the plan is not valid: {error}"
                return report
        report.encodings |= plan.encodings  # rounded values stay in the cache
        report.tolerance = max(report.tolerance, *(ENCODED_TOLERANCE[each] for each in report.encodings), 0.0)
        if recorder is not None:
            recorder.begin(step)
        results = engine.run_plan(batch, plan)
        if recorder is not None:
            _compare_stages(report, step, reference.tensors[step], recorder, resolved, batch)
        _compare_logits(report, step, batch, reference.logits[step], results)
    report.mean_logit_difference /= max(report.num_rows, 1)
    report.kl /= max(report.num_rows, 1)
    report.agreement /= max(report.num_rows, 1)
    if report.first_difference is not None:
        report.failure = str(report.first_difference)
    elif reference.outside and (others := [flip for flip in report.flips if flip.margin > report.tolerance]):
        report.failure = f"{len(others)} rows go to other experts, and not by a near-tie: first {others[0]}"
    return report


def _compare_stages(
    report: LayoutReport,
    step: int,
    expected: dict[Spot, Copy],
    recorder: Recorder,
    resolved: Resolved,
    batch: Batch,
) -> None:
    rows, logits = _splits(resolved, batch)
    picked = list(batch.logit_rows())
    got = recorder.copies(rows, logits)
    if report.encodings:
        _compare_ranks(report, step, got, {RowSet.ALL: rows, RowSet.LOGITS: logits})
    for spot, wanted in expected.items():
        if spot not in got or spot.field == "next_ids":
            continue  # a sharding may lack a stage of the other; tokens are compared by agreement
        if spot.stage == "experts" and resolved.sharding.shared_expert == "replicated":
            continue  # here without the shared expert, which joins after: the next norm's residual has both
        for copy in got[spot]:
            split, want, have = rows, wanted.tensor, copy.tensor
            if RowSet.LOGITS in (wanted.row_set, copy.row_set):
                split = logits
                want = want[picked] if wanted.row_set is RowSet.ALL else want
                have = have[picked] if copy.row_set is RowSet.ALL else have
            _compare(report, step, spot, want, have, lambda row, copy=copy, split=split: copy.rank_of(row, split))  # type: ignore[misc]


def _splits(resolved: Resolved, batch: Batch) -> tuple[RowSplit, RowSplit]:
    rows = RowSplit.from_groups(resolved.mesh, batch.group_rows)
    return rows, logit_split(rows, batch.logit_rows())


def _compare_ranks(
    report: LayoutReport, step: int, got: dict[Spot, list[Copy]], splits: dict[RowSet, RowSplit]
) -> None:
    """Where rows are encoded the tolerance is wide, so ranks are held against each other too: to the bit."""
    for spot, (first, *others) in got.items():
        for copy in others:
            if report.first_difference is None and not torch.equal(first.tensor, copy.tensor):
                _compare(
                    report,
                    step,
                    spot,
                    first.tensor,
                    copy.tensor,
                    lambda row, copy=copy: copy.rank_of(row, splits[copy.row_set]),  # type: ignore[misc]
                    between_ranks=True,
                )


def _compare(
    report: LayoutReport,
    step: int,
    spot: Spot,
    wanted: Tensor,
    got: Tensor,
    rank_of: Callable[[int], int | None],
    *,
    between_ranks: bool = False,
) -> None:
    tolerance = 0.0 if between_ranks else report.tolerance
    difference = (got.double() - wanted.double()).abs().nan_to_num(nan=float("inf"))
    if difference.numel() == 0:
        return
    size = wanted.double().square().mean().sqrt().item()
    relative = difference.square().mean().sqrt().item() / max(size, 1e-30)
    report.worst = max(report.worst, relative)
    if relative > tolerance and report.first_difference is None:
        over = ~(difference.amax(dim=-1) <= tolerance * size)
        row = int(over.nonzero()[0]) if over.any() else 0
        report.first_difference = Difference(
            step=step,
            spot=spot,
            relative=relative,
            largest=difference.max().item(),
            row=row,
            rank=rank_of(row),
            between_ranks=between_ranks,
        )


def _compare_logits(
    report: LayoutReport, step: int, batch: Batch, expected: Tensor, results: Sequence[StepResult]
) -> None:
    """Every rank's logits count: the differences are those of the rank that is furthest off."""
    if expected.shape[0] == 0:
        return
    wanted = expected.double()
    log_p = wanted.log_softmax(-1)
    mean, kl, agreed = 0.0, 0.0, float("inf")
    for rank, result in enumerate(results):
        assert result.logits is not None
        got = result.logits.double()
        # Not a stage's output but the result of the moves after the LM head.
        _compare(report, step, Spot(None, "gathered", "logits"), wanted, got, lambda row, rank=rank: rank)  # type: ignore[misc]
        difference = (got - wanted).abs().nan_to_num(nan=float("inf"))
        largest = difference.max().item()
        if report.largest_at is None or largest > report.max_logit_difference:
            report.max_logit_difference = largest
            report.largest_at = _logit_positions(batch)[int(difference.amax(-1).argmax())]
        mean = max(mean, difference.mean(-1).sum().item())
        divergence = (log_p.exp() * (log_p - got.log_softmax(-1))).sum().nan_to_num(nan=float("inf"))
        kl = max(kl, divergence.item())
        agreed = min(agreed, float((got.argmax(-1) == wanted.argmax(-1)).sum()))
    report.num_rows += expected.shape[0]
    report.mean_logit_difference += mean
    report.kl += kl
    report.agreement += agreed


def _logit_positions(batch: Batch) -> list[tuple[int, int]]:
    """(request, position) of every row with logits, in their order."""
    return [
        (chunk.request, chunk.start + row)
        for group in batch.groups
        for chunk in group
        for row in range(len(chunk.tokens) - chunk.num_logits, len(chunk.tokens))
    ]
