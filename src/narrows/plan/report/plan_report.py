"""The report on one step of a deployment: its plans under several layouts, why `auto` was chosen, and memory.

:meth:`PlanReport.document` is the same report as plain data, for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.memory import MemoryUse
from narrows.cost.pricer import StepShape
from narrows.plan.named import NAMED_LAYOUTS, applicable_layouts, inapplicable, named_layout
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner, choose_sharding
from narrows.plan.report.crossovers import RowRange, Sweep
from narrows.plan.report.evidence import Evidence, evidence_line, nodes_line, ranks_line
from narrows.plan.report.explain import why
from narrows.plan.report.flips import LARGEST_FACTOR, Flip, flips
from narrows.plan.workspace import Workspace

__all__ = ["Entry", "PlanReport", "make_report"]

_SWEEP_TOP = {"prefill": 65536, "decode": 4096}
"""Row counts up to which the best layout is listed, unless the step itself is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One plan with its weight sharding, and the memory that needs."""

    plan: Plan
    sharding: WeightSharding
    memory: MemoryUse
    workspace: Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """``entries`` are the requested plans, in that order; ``auto`` is there whether it was requested or not.

    ``inapplicable`` has the reason for each named layout that was not requested by name and cannot apply.
    ``best_named`` and ``best_auto`` say what is best at how many rows. ``flips``: at which error of which price `auto`
    would be another plan, the smallest error first.
    """

    deployment: Deployment
    shape: StepShape
    entries: tuple[Entry, ...]
    auto: Entry
    inapplicable: Mapping[str, str]
    why: tuple[str, ...]
    best_named: tuple[RowRange, ...]
    best_auto: tuple[RowRange, ...]
    flips: tuple[Flip, ...]
    notes: tuple[str, ...]

    @property
    def warning(self) -> str:
        """What does not fit memory, in one line with the way out; empty if all does."""
        memory, tokens = self.auto.memory, self.shape.kv_tokens
        rank = f"a rank of {self.deployment.device.name} has {memory.usable / 1e9:.1f} GB usable"
        if not memory.fits:
            return (
                f"does not fit: {memory.weights / 1e9:.1f} GB of {self.deployment.dtype} weights per rank on "
                f"{self.deployment.mesh}, where {rank}; more ranks, fewer rows, or another dtype would"
            )
        if not memory.holds(tokens):
            return (
                f"does not fit: beside {memory.weights / 1e9:.1f} GB of weights {memory.context_tokens} tokens of KV "
                f"cache fit in an attention group, and this step needs {tokens}, where {rank}; more ranks, fewer rows "
                "or a shorter context would"
            )
        return ""

    @property
    def evidence(self) -> str:
        """One line if `auto` rests on prices that were not measured, else empty."""
        return evidence_line(self.deployment.device.name, {"auto": self.auto.plan})

    def document(self) -> dict[str, Any]:
        """The report as one JSON-ready document; times are milliseconds and microseconds, sizes GB (1e9) and bytes."""
        deployment, shape = self.deployment, self.shape
        mesh = deployment.mesh
        return {
            "model": deployment.config.name,
            "mesh": dict(zip(mesh.names, mesh.sizes, strict=True)),
            "nodes": str(deployment.topology),
            "network": "" if deployment.topology.is_one_node else deployment.network.name,
            "device": deployment.device.name,
            "dtype": deployment.dtype,
            "graph": deployment.graph,
            "encode_rows": deployment.encode_rows,
            "expert_skew": deployment.expert_skew,
            "kv_dtype": deployment.kv_dtype,
            "engine": deployment.engine.name,
            "shape": {
                "phase": shape.phase,
                "rows": shape.rows.total,
                "group_rows": list(shape.group_rows),
                "logit_rows": shape.logits.total,
                "context": shape.context,
            },
            "layouts": [self._entry(entry) for entry in self.entries],
            "inapplicable": dict(self.inapplicable),
            "warning": self.warning,
            "why": list(self.why),
            "evidence": self.evidence,
            "crossovers": {
                "named": [asdict(found) for found in self.best_named],
                "auto": [asdict(found) for found in self.best_auto],
            },
            "flips": {
                "compared": f"all legal plans, each group of prices times {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}",
                "found": [asdict(flip) for flip in self.flips],
            },
            "notes": list(self.notes),
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        plan, memory = entry.plan, entry.memory
        totals = {str(price_class): _round(seconds * 1e3) for price_class, seconds in plan.totals().items()}
        total = _round(plan.seconds * 1e3)
        return {
            "name": plan.layout_name,
            "weight_sharding": asdict(entry.sharding),
            "total_ms": total,
            "totals_ms": totals | {"total": total},
            "between_nodes_ms": _round(plan.internode_seconds * 1e3),
            "band": _round(plan.band),
            "price_shares": {source: _round(share) for source, share in Evidence.of(plan).shares.items()},
            "memory": {
                "weights_gb": _round(memory.weights / 1e9),
                "device_gb": _round(memory.device / 1e9),
                "usable_gb": _round(memory.usable / 1e9),
                "process_gb": _round(memory.process / 1e9),
                "workspace_gb": {name: _round(nbytes / 1e9) for name, nbytes in asdict(entry.workspace).items()}
                | {"total": _round(memory.workspace / 1e9)},
                "fits": memory.fits,
                "kv_bytes_per_token": memory.kv_per_token,
                "context_tokens_per_group": memory.context_tokens,
                "step_kv_tokens": self.shape.kv_tokens,
                "holds_step": memory.holds(self.shape.kv_tokens),
            },
            "ops": [
                {
                    "segment": segment.name,
                    "layers": list(segment.layers),
                    "times": segment.times,
                    "kind": str(op.kind),
                    "name": op.name,
                    "boundary": op.boundary,
                    "class": str(op.price_class),
                    "reads": list(op.reads),
                    "reads_at": [str(layout) for layout in op.reads_at],
                    "writes": list(op.writes),
                    "writes_at": [str(layout) for layout in op.writes_at],
                    "layout": op.layout.title(plan.mesh) or str(op.layout),
                    "encodings": [str(encoding) for encoding in op.encodings],
                    "axes": op.move.axes if op.move is not None else "",
                    "algorithm": str(op.move.algorithm) if op.move is not None else "",
                    "nodes": plan.num_nodes(op),
                    "rows": op.rows,
                    "bytes": op.nbytes,
                    "us": _round(op.ps / 1e6),
                    "source": op.source.label,
                    "band": _round(op.error / op.ps) if op.ps else 0.0,
                }
                for segment in plan.segments
                for op in segment.ops
            ],
        }


def make_report(
    deployment: Deployment,
    shape: StepShape,
    layouts: Sequence[str] = (),
    *,
    logit_rows: int | None = None,
    notes: Sequence[str] = (),
) -> PlanReport:
    """Plan one step under ``layouts``, or under all that apply if none is named.

    Named layouts have the published weight sharding, `auto` has the one that is best for this step among those that
    fit memory. ``logit_rows`` is what ``shape`` was made with, for the steps of other sizes that it is compared with.

    Raises:
        ConfigError: an unknown layout, or one that cannot apply to this model and mesh.
    """
    config, mesh = deployment.config, deployment.mesh
    for name in layouts:
        named_layout(name, config, mesh)
    requested = tuple(dict.fromkeys(layouts)) or applicable_layouts(config, mesh)
    sharding = choose_sharding(deployment, [(shape, 1.0)])
    published = Planner(deployment, deployment.published(WeightSharding()))
    planner = published if sharding == published.sharding else Planner(deployment, sharding)

    def entry(name: str, by: Planner) -> Entry:
        rules = named_layout(name, config, mesh)
        if rules.sharding is not None and by.sharding != (held := deployment.published(rules.sharding)):
            by = Planner(deployment, held)
        plan = by.plan(shape, name)
        return Entry(plan=plan, sharding=by.sharding, memory=by.memory(plan), workspace=by.workspace(plan))

    auto = entry("auto", planner)
    entries = tuple(auto if name == "auto" else entry(name, published) for name in requested)
    named = tuple(name for name in requested if name != "auto")
    others = [each.plan for each in entries if each is not auto]
    if planner is not published:
        others.append(replace(published.plan(shape), layout_name="auto with the published sharding"))
    if deployment.encode_rows != "none":
        plain = Planner(replace(deployment, encode_rows="none"), sharding)
        others.append(replace(plain.plan(shape), layout_name="auto with plain rows"))
    sweep = Sweep(shape=shape, top=max(_SWEEP_TOP[shape.phase], 2 * shape.rows.total), logit_rows=logit_rows)
    return PlanReport(
        deployment=deployment,
        shape=shape,
        entries=entries,
        auto=auto,
        inapplicable={
            name: reason
            for name in NAMED_LAYOUTS
            if name not in requested and (reason := inapplicable(name, config, mesh))
        },
        why=tuple(why(auto.plan, other) for other in others),
        best_named=sweep.named(published, named or applicable_layouts(config, mesh)[:-1]),
        best_auto=sweep.auto(planner),
        flips=flips(planner, auto.plan, [each.plan for each in entries if each is not auto]),
        notes=(
            *notes,
            *filter(None, [nodes_line(deployment), deployment.engine.note, ranks_line(deployment.device, mesh.size)]),
            *_room(auto, shape),
            *config.notes,
        ),
    )


def _room(auto: Entry, shape: StepShape) -> tuple[str, ...]:
    if auto.memory.holds(shape.kv_tokens):
        return ()
    return (
        f"no weight sharding leaves room for the {shape.kv_tokens} tokens of KV cache per attention group that this "
        "step needs, so auto has the published one",
    )


def _round(value: float) -> float:
    return round(value, 6)
