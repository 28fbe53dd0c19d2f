"""Decode steps run as a server runs them, replayed from a capture, against the same steps run op by op: to the bit.

A server captures a decode step from rows of no request (token 0 at position 1 of the null page) and replays it with
the batch's own rows. So does this module, and then runs the same batch op by op: first the replay, so that it cannot
read the other run's rows from the cache. Ids and logits of every rank must be the same bits. Where they differ,
the contexts that the rows were given and the number of collectives say why, if the cause is one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrows.arch.weight_sharding import WeightSharding
from narrows.engine.capture import uncaptured
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Operation, Wrap
from narrows.engine.worker import StepResult, Worker
from narrows.evaluate.verify_batches import VerifyBatches
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts, named_layout
from narrows.plan.plan import Op, Plan
from narrows.sched.batch import Batch

__all__ = ["BothWays", "ReplayFault", "ServedPath", "ServedReport", "served_line", "verify_served"]

_MOST_NAMED = 8
"""Rows that a fault lists by number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFault:
    """The first decode step whose replay left other bits than the op-by-op run. ``rows`` of the step, ascending;
    ``first`` says what differs in the first of them, ``cause`` why, as far as that is known."""

    step: int
    rank: int
    num_rows: int
    rows: tuple[int, ...]
    first: str
    cause: str = ""

    def __str__(self) -> str:
        differs = self.first
        if self.rows:
            named = ", ".join(map(str, self.rows[:_MOST_NAMED])) + ", ..." * (len(self.rows) > _MOST_NAMED)
            differs = f"row{'s' * (len(self.rows) > 1)} {named} of {self.num_rows}: {differs}"
        cause = f"; {self.cause}" if self.cause else ""
        return f"step {self.step}, rank {self.rank}: the replay is not the op-by-op run: {differs}{cause}"


@dataclass(slots=True, kw_only=True)
class ServedPath:
    """How decode steps ran: so many, and of these so many replayed on every rank, up to the first ``fault``.
    ``uncaptured``: why none can be replayed, in a few words; empty if one can."""

    uncaptured: str = ""
    num_decode: int = 0
    num_replayed: int = 0
    fault: ReplayFault | None = None


def served_line(dtype: str, paths: Sequence[ServedPath]) -> str:
    """One line of what ran in ``dtype``: ``captured`` where any step was replayed, all ``paths`` counted together."""
    captured = [path for path in paths if not path.uncaptured]
    if not captured:
        return f"served path: op by op: {paths[0].uncaptured}"
    replayed, decode = sum(path.num_replayed for path in captured), sum(path.num_decode for path in captured)
    if not replayed:
        return f"served path: op by op: none of {decode} decode steps could be captured"
    same = "" if any(path.fault for path in captured) else ", ids and logits bit for bit those of op by op"
    return f"served path: captured ({dtype}): {replayed} of {decode} decode steps replayed{same}"


class BothWays:
    """Runs an engine's batches as a server does and, where that is a replay, op by op too.

    The engine's cache is written over: it must not be running anything else.
    """

    def __init__(self, engine: Engine) -> None:
        resolved = engine.resolved
        self._engine = engine
        self._captured: set[tuple[object, ...]] = set()
        self.path = ServedPath(uncaptured=_uncaptured(resolved, engine.ranks.transport))
        self._step = 0

    def run(self, batch: Batch, plan: Plan) -> list[StepResult]:
        """Every rank's result with logits, of the path that serves. A difference is kept in ``path.fault``."""
        step, self._step = self._step, self._step + 1
        if batch.phase != "decode":
            return self._engine.run_plan(batch, plan)
        path = self.path
        path.num_decode += 1
        if path.uncaptured:
            return self._engine.run_op_by_op(batch, plan)
        key = plan.signature(), batch.group_rows
        if key not in self._captured:
            self._captured.add(key)
            self._engine.capture(batch, plan)
        served = self._engine.run_plan(batch, plan)
        if not all(result.run is not None and result.run.replayed for result in served):
            return served  # no capture was kept: a server runs this step op by op too
        path.num_replayed += 1
        plain = self._engine.run_op_by_op(batch, plan)
        if path.fault is None:
            path.fault = first_fault(self._engine.resolved.mesh, step, batch, served, plain)
        return served


def _uncaptured(resolved: Resolved, transport: str) -> str:
    if why := uncaptured(resolved.dtype, resolved.engine_config.run_on):
        return why
    if resolved.engine_config.checked:
        return "--checked compares every step between ranks, and captures none"
    if resolved.mesh.size > 1 and resolved.engine_config.ranks == "threads":
        return "rank threads capture no steps (--ranks processes)"
    if resolved.mesh.size > 1 and "shared memory" not in transport:
        return f"collectives travel by {transport}"
    return ""


def first_fault(
    mesh: Mesh, step: int, batch: Batch, served: Sequence[StepResult], plain: Sequence[StepResult]
) -> ReplayFault | None:
    """The difference between a step's replay and its op-by-op run; None if all bits are the same. Of several ranks, the
    first whose cause is known."""
    found = [_fault(mesh, step, batch, rank, *both) for rank, both in enumerate(zip(served, plain, strict=True))]
    faults = [fault for fault in found if fault is not None]
    return next((fault for fault in faults if fault.cause), faults[0] if faults else None)


def _fault(mesh: Mesh, step: int, batch: Batch, rank: int, served: StepResult, plain: StepResult) -> ReplayFault | None:
    assert served.logits is not None and plain.logits is not None
    same_T = (_bits(served.logits) == _bits(plain.logits)).all(-1).tolist()
    differs = [i for i, same in enumerate(same_T) if not same or served.ids[i : i + 1] != plain.ids[i : i + 1]]
    cause = _cause(mesh, batch, rank, served, plain)
    if not differs and not cause:
        return None
    rows = batch.logit_rows()
    return ReplayFault(
        step=step,
        rank=rank,
        num_rows=batch.num_rows,
        rows=tuple(rows[i] for i in differs),
        first=_first(served, plain, differs[0]) if differs else "the logits are the same bits",
        cause=cause,
    )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _first(served: StepResult, plain: StepResult, at: int) -> str:
    assert served.logits is not None and plain.logits is not None
    ours, theirs = served.logits[at].double(), plain.logits[at].double()
    column = int((_bits(served.logits)[at] != _bits(plain.logits)[at]).int().argmax())
    return (
        f"greedy id {served.ids[at]} where op by op gives {plain.ids[at]}, "
        f"logit {column} is {ours[column]:.6g} and not {theirs[column]:.6g}"
    )


def _cause(mesh: Mesh, batch: Batch, rank: int, served: StepResult, plain: StepResult) -> str:
    """Differences between the inputs or actions of the two runs."""
    ours, theirs = served.run, plain.run
    assert ours is not None and theirs is not None
    first = sum(batch.group_rows[: mesh.group_of(rank)])
    for row, (got, wanted) in enumerate(zip(ours.contexts, theirs.contexts, strict=True), start=first):
        if got.length != wanted.length:
            return f"a stale length: row {row} reads {got.length} tokens and not {wanted.length}"
        if got.slot != wanted.slot:
            return f"a wrong slot: row {row} writes slot {got.slot} of the cache and not {wanted.slot}"
        if got.position != wanted.position:
            return f"a stale position: row {row} is at {got.position} and not {wanted.position}"
    if ours.collectives != theirs.collectives:
        left_out = next((name for name in theirs.collectives if name not in ours.collectives), "")
        return f"a collective left out: {left_out}" if left_out else "other collectives, or in another order"
    if ours.num_collectives != theirs.num_collectives:
        return f"{ours.num_collectives} collectives were made and not {theirs.num_collectives}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedReport:
    """The served path of every layout that was run, in ``dtype``."""

    dtype: str
    paths: dict[str, ServedPath] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> dict[str, ReplayFault]:
        """By layout."""
        return {name: path.fault for name, path in self.paths.items() if path.fault is not None}

    def __str__(self) -> str:
        return served_line(self.dtype, list(self.paths.values()))


def verify_served(
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_decode: int = 8,
    layouts: Sequence[str] = (),
    plant: Callable[[Worker], Wrap] | None = None,
) -> ServedReport:
    """Run ``prompts`` (token ids) under every layout that applies to ``config``'s mesh, on ranks as a server has them
    (processes), each decode step replayed and op by op.

    Args:
        config: model, mesh and dtype; its layout is not used. In float32, in which no step is captured, the model's own
            dtype is taken, since a server does so.
        num_decode: steps after the prompts.
        layouts: names to run instead of all that apply.
        plant: for tests that plant a fault in captures: an instrument that every rank makes before it runs a step.

    Raises:
        ConfigError: a model or mesh that cannot be, or a layout that cannot apply.
    """
    dtype = "auto" if config.dtype == "float32" else config.dtype
    steps = max(num_decode, 2)  # the first of them is mixed where there are several prompts
    verify_batches = VerifyBatches(prompts, num_groups=config.dp, num_steps=steps, page_size=config.page_size)
    config = replace(
        config,
        want_logits=True,
        layout="auto",
        dtype=dtype,
        max_context=verify_batches.max_context,
        kv_tokens=verify_batches.kv_tokens,
    )
    resolved = resolve(config)
    if resolved.mesh.size > 1:
        config = replace(config, ranks="processes")
    report = ServedReport(dtype=str(resolved.dtype).removeprefix("torch."))
    names = tuple(layouts) or applicable_layouts(resolved.config, resolved.mesh)
    if why := uncaptured(resolved.dtype, config.run_on):
        report.paths.update({name: ServedPath(uncaptured=why) for name in names})
        return report
    by_sharding: dict[WeightSharding, list[str]] = {}
    for name in names:
        rules = named_layout(name, resolved.config, resolved.mesh)
        by_sharding.setdefault(rules.sharding or resolved.sharding, []).append(name)
    batches: list[Batch] = []
    for sharding, group in by_sharding.items():
        with Engine(resolve(config, sharding)) as engine:
            for name in group:
                engine.instrument(plant, "plant")
                engine.instrument(_Emptied, "emptied")  # plans are bound again, and no capture is left
                report.paths[name] = _run_layout(engine, name, verify_batches, batches)
    return report


class _Emptied:
    """An instrument that empties the caches when it is made, and is around no step: a row that a capture writes to a
    wrong slot must not find its own in the right one from an earlier layout."""

    def __init__(self, worker: Worker) -> None:
        for cache in worker.caches():
            cache.zero_()

    def __call__(
        self, layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        return operation


def _run_layout(engine: Engine, name: str, verify_batches: VerifyBatches, batches: list[Batch]) -> ServedPath:
    """Run the fixed batches; the first layout's tokens are kept in ``batches`` and fed to the others."""
    both, cache, known = BothWays(engine), engine.plans.cache_of(name), bool(batches)
    for batch in list(batches) if known else verify_batches:
        results = both.run(batch, cache.plan_for(batch))
        if not known:
            verify_batches.sampled(batch, results[0].ids)
            batches.append(batch)
    return both.path
