"""An all-reduce and its norm in one step, among processes that share memory: the bits of the two one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrows.arch.stages import StageKind
from narrows.arch.weight_sharding import WeightSharding
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.evaluate.verify_batches import VerifyBatches
from narrows.plan.plan import ALL_REDUCE_NORM, Op, Plan

PROMPTS = [tuple(range(1, 8)), (9, 8, 7), (5, 6) * 12, (33,)]


def in_one(plan: Plan) -> Plan:
    """``plan`` with every all-reduce that a norm follows made one step with it."""

    def merged(ops: tuple[Op, ...]) -> tuple[Op, ...]:
        out: list[Op] = []
        for op in ops:
            before = out[-1] if out else None
            norm = op.stage is not None and op.stage.kind is StageKind.NORM
            if norm and before is not None and before.name == "all_reduce" and op.layout == before.leaves:
                reads_at = (before.layout, *op.reads_at[1:])
                out[-1] = replace(
                    op,
                    kind=before.kind,
                    name=ALL_REDUCE_NORM,
                    move=before.move,
                    reads_at=reads_at,
                    price_class=before.price_class,
                )
            else:
                out.append(op)
        return tuple(out)

    return replace(plan, segments=tuple(replace(segment, ops=merged(segment.ops)) for segment in plan.segments))


@pytest.mark.parametrize(
    ("dp", "tp", "dtype"),
    [
        (1, 2, "bfloat16"),
        (2, 2, "float32"),
        pytest.param(1, 2, "float32", marks=pytest.mark.full),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.full),
    ],
)
def test_one_step_or_two_give_the_same_bits(speaking_v3: Path, dp: int, tp: int, dtype: str) -> None:
    """Groups with other rows and without any, prefill beside decode, few logits; residuals apart and joined."""
    script = VerifyBatches(PROMPTS, num_groups=dp, num_steps=6, page_size=16, few_logits=True)
    engine_config = EngineConfig(
        model=str(speaking_v3),
        dp=dp,
        tp=tp,
        dtype=dtype,
        max_context=script.max_context + 12,
        kv_tokens=2 * script.kv_tokens,
        checked=dp == 1,
        want_logits=True,
        ranks="processes",
    )
    layouts, seen = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather")[: 1 + dp], set()
    with Engine(resolve(engine_config, WeightSharding())) as engine:
        for batch in script:
            for layout in layouts:
                plan = engine.plans.cache_of(layout).plan_for(batch)
                one = in_one(plan)
                one.validate()
                wanted, got = engine.run_plan(batch, plan), engine.run_plan(batch, one)
                seen |= {(op.boundary, op.fused) for _, op in one.ops() if op.name == ALL_REDUCE_NORM}
                for theirs, mine in zip(wanted, got, strict=True):
                    assert mine.logits is not None and theirs.logits is not None
                    assert mine.ids == theirs.ids and torch.equal(mine.logits, theirs.logits), layout
            script.sampled(batch, wanted[0].ids)
    assert {("post_attn_norm", True), ("final_norm", True)} <= seen
