"""A running engine as plain data for ``/server_info``: config, mesh, limits, sharding, plans, sources of prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from narrows.arch.weight_sharding import sharding_words
from narrows.engine.config import Resolved
from narrows.engine.core import Engine
from narrows.plan.cache import PlanKey
from narrows.plan.plan import OpKind, Plan
from narrows.plan.report.evidence import Evidence

__all__ = ["describe"]


def describe(
    resolved: Resolved,
    engine: Engine | None,
    steps: Mapping[tuple[str, int, str], int],
    times: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """One document. ``steps``: number of steps by (phase, bucket of rows, layout); ``times``: measured times of a
    plan's steps, by its ``id``."""
    engine_config, mesh, config = resolved.engine_config, resolved.mesh, resolved.config
    items = engine.plans.items() if engine is not None else ()
    plans = [{**_plan(key, plan), **times.get(id(plan), {"steps": 0})} for key, plan in items]
    return {
        "model": {
            "name": config.name,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
        },
        "mesh": dict(zip(mesh.names, mesh.sizes, strict=True)),
        "layout": resolved.plan.layout_name if resolved.plan else engine_config.layout,
        "weight_sharding": (sharding := sharding_words(config, resolved.sharding)),
        "forms": sharding,  # the old name, kept for one release
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "quantization": engine_config.quantization,
        "encode_rows": engine_config.encode_rows,
        "batch_invariant": engine_config.batch_invariant,
        "run_on": engine_config.run_on,
        "ranks": engine_config.ranks,
        "threads_per_rank": engine_config.threads,
        "collectives": engine.ranks.transport if engine is not None else "",
        "limits": asdict(resolved.limits),
        "kv_tokens_per_group": resolved.limits.tokens_per_group,
        "priced_for": resolved.deployment.device.name,
        "plan_cache": plans,
        "plan_book": plans,  # its name before 0.2, kept for one release
        "steps_run": [
            {"phase": phase, "rows_up_to": rows, "layout": layout, "steps": count}
            for (phase, rows, layout), count in sorted(steps.items())
        ],
        "notes": list(resolved.notes),
    }


def _plan(key: PlanKey | None, plan: Plan) -> dict[str, Any]:
    """A plan in short: its steps, its moves, predicted time, and the sources of its prices."""
    moves: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for segment in plan.segments:
        for op in segment.ops:
            sources[op.source.label] += segment.times
            if op.kind is OpKind.MOVE:
                moves[f"{op.move} before {op.boundary}: {'+'.join(op.reads)}"] += segment.times
    return {
        "for": asdict(key) if key is not None else "every step",
        "layout": plan.layout_name,
        "gives_logits": plan.gives_logits,
        "predicted_ms": round(plan.seconds * 1e3, 4),
        "moves": dict(moves),
        "price_sources": dict(sources),
        "price_shares": {source: round(share, 4) for source, share in Evidence.of(plan).shares.items()},
    }
