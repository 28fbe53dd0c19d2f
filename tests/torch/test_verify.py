"""`verify`: layouts that are right pass, and every fault that is planted is seen and named where it happened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.arch.stages import RowSet
from narrows.arch.weights import Weight
from narrows.comm import Communicator
from narrows.engine.config import EngineConfig
from narrows.errors import ConfigError
from narrows.evaluate.recorder import Spot
from narrows.evaluate.verify import TOLERANCE, LayoutReport, verify
from narrows.evaluate.verify_batches import VerifyBatches
from narrows.plan.plan import Op, OpKind, Plan
from narrows.weights.safetensors_folder import SafetensorsFolder
from narrows.weights.source import WeightSource

REDUCTIONS = ("all_reduce", "reduce_scatter")
LAYOUTS = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel", "auto")
Change = Callable[[Weight, int, int, Tensor], Tensor]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 67, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def engine_config(tiny_model: Callable[..., Path]) -> EngineConfig:
    return EngineConfig(model=str(tiny_model("v3")), dp=2, tp=2, dtype="float32")


class Changed:
    """A checkpoint with different values of some tensors on some ranks.

    ``change`` gets the weight, the rank that asks, how many times that rank has asked for it before (the first time is
    the one rank that all others are compared with), and the true tensor.
    """

    def __init__(self, source: WeightSource, change: Change) -> None:
        self._source, self._change = source, change
        self._asked: dict[tuple[str, int], int] = {}

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        rank = int(threading.current_thread().name.removeprefix("narrows rank "))
        times = self._asked[weight.name, rank] = self._asked.get((weight.name, rank), -1) + 1
        return self._change(weight, rank, times, self._source.take(weight, span, expert))


def changed(engine_config: EngineConfig, change: Change) -> Changed:
    return Changed(SafetensorsFolder(Path(engine_config.model)), change)


def without(is_one: Callable[[int, int | None, Op], bool]) -> Callable[[Plan], Plan]:
    """Removes the steps for which ``is_one(number among the plan's steps, layer, step)``."""

    def tamper(plan: Plan) -> Plan:
        segments, number = [], 0
        for segment in plan.segments:
            kept = []
            for op in segment.ops:
                layer = segment.layers[0] if segment.layers else None
                if not is_one(number, layer, op):
                    kept.append(op)
                number += 1
            segments.append(replace(segment, ops=tuple(kept)))
        return replace(plan, segments=tuple(segments))

    return tamper


def completes(op: Op) -> bool:
    return op.kind is OpKind.MOVE and op.name in REDUCTIONS and not op.leaves.owes_sum


# -- all is well -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_agrees_with_one_rank(engine_config: EngineConfig, dtype: str) -> None:
    report = verify(replace(engine_config, dtype=dtype), prompts(23, 5, 40, 1, 9))
    assert report.ok and [layout.layout for layout in report.layouts] == list(LAYOUTS)
    assert report.skipped == {} and report.tolerance == TOLERANCE[report.resolved.dtype]
    for layout in report.layouts:
        assert layout.ok and layout.first_difference is None and layout.num_rows > 90
        assert 0 < layout.worst < report.tolerance
        if dtype == "float32":
            assert layout.max_logit_difference < 1e-5 and abs(layout.kl) < 1e-9 and layout.agreement == 1.0
            assert layout.mean_logit_difference <= layout.max_logit_difference
        else:
            assert layout.max_logit_difference < 0.2 and layout.agreement > 0.8


def test_layouts_that_do_not_apply_are_listed_with_the_reason(engine_config: EngineConfig) -> None:
    report = verify(replace(engine_config, dp=1), prompts(6, 3), num_decode=2)
    assert "norm-before-gather" not in [layout.layout for layout in report.layouts]
    assert report.ok and "dp is 1" in report.skipped["norm-before-gather"]


def test_one_layout_can_be_chosen_and_an_inapplicable_one_is_refused(engine_config: EngineConfig) -> None:
    report = verify(engine_config, prompts(6, 3), num_decode=2, layouts=["sequence-parallel"])
    assert [layout.layout for layout in report.layouts] == ["sequence-parallel"]
    with pytest.raises(ConfigError, match="dp is 1"):
        verify(replace(engine_config, dp=1), prompts(6, 3), layouts=["norm-before-gather"])


@pytest.mark.parametrize("wrong", [[], [[]], [[1], []]])
def test_without_a_prompt_there_is_nothing_to_verify(engine_config: EngineConfig, wrong: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="at least one prompt"):
        verify(engine_config, wrong)


def test_the_batches_cover_every_kind_of_step() -> None:
    script = VerifyBatches(prompts(23, 5, 40, 1, 9), num_groups=2, num_steps=8, page_size=16, few_logits=True)
    phases, rows = [], []
    for number, batch in enumerate(script):
        script.sampled(batch, (7,) * batch.num_logit_rows)
        chunks = [chunk for group in batch.groups for chunk in group]
        assert batch.num_logit_rows == (len(chunks) if number == 2 else batch.num_rows)
        phases.append((batch.phase, len({len(chunk.tokens) == 1 for chunk in chunks})))
        rows.append(batch.group_rows)
    assert ("prefill", 1) in phases and ("prefill", 2) in phases and ("decode", 1) in phases
    assert any(counts[1] == 0 for counts in rows) and any(counts[0] > 4 * counts[1] > 0 for counts in rows)


# -- the last layer on the rows with logits alone ----------------------------------------------------------------------


def early(plan: Plan) -> Plan:
    """``plan`` with its rows selected right after the last attention; all that follows is on those rows."""
    if selects_in_a_layer(plan):
        return plan
    ops = plan.segments[-1].ops
    (select,) = [op for op in ops if op.kind is OpKind.SELECT]
    *segments, last = plan.segments[:-1]
    if len(last.layers) > 1:
        segments.append(replace(last, layers=last.layers[:-1]))
    at = 1 + next(i for i, op in enumerate(last.ops) if op.name == "attention")
    live = [("hidden", last.ops[at - 1].leaves)]
    for op in last.ops[:at]:
        if "residual" in op.writes:
            live[1:] = [("residual", op.writes_at[op.writes.index("residual")])]
    names, layouts = (tuple(x) for x in zip(*live, strict=True))
    select = replace(select, reads=names, writes=names, reads_at=layouts, writes_at=layouts, boundary="post_attn_norm")
    on_logits = [_last_layers(replace(op, row_set=RowSet.LOGITS)) for op in last.ops[at:]]
    segments.append(replace(last, layers=last.layers[-1:], ops=(*last.ops[:at], select, *on_logits)))
    rest = [replace(op, row_set=RowSet.LOGITS) for op in ops if op.kind is not OpKind.SELECT]
    return replace(plan, segments=(*segments, replace(plan.segments[-1], ops=tuple(rest))))


def _last_layers(op: Op) -> Op:
    return op if op.stage is None else replace(op, stage=replace(op.stage, any_rows=True))


def selects_in_a_layer(plan: Plan) -> bool:
    return any(layer is not None and op.kind is OpKind.SELECT for layer, op in plan.ops())


def test_a_last_layer_on_the_rows_with_logits_agrees_stage_by_stage(engine_config: EngineConfig) -> None:
    seen: list[tuple[str, bool]] = []

    def tamper(plan: Plan) -> Plan:
        seen.append((plan.layout_name, selects_in_a_layer(early(plan))))
        return early(plan)

    report = verify(engine_config, prompts(23, 5, 40, 1, 9), layouts=LAYOUTS, tamper=tamper)
    assert report.ok, [layout.failure for layout in report.layouts]
    assert {name for name, _ in seen} == set(LAYOUTS) and all(selects for _, selects in seen)
    assert all(layout.worst < 1e-5 for layout in report.layouts)


def test_a_field_with_unselected_rows_is_refused_and_detected(engine_config: EngineConfig) -> None:
    """The residual keeps all rows, or is selected as if it lay elsewhere than it does."""

    def spoil(change: Callable[[Op], Op]) -> Callable[[Plan], Plan]:
        def tamper(plan: Plan) -> Plan:
            plan = early(plan)
            return replace(
                plan,
                segments=tuple(
                    replace(
                        segment,
                        ops=tuple(
                            change(s) if s.kind is OpKind.SELECT and len(s.reads) > 1 else s for s in segment.ops
                        ),
                    )
                    for segment in plan.segments
                ),
            )

        return tamper

    def hidden_alone(op: Op) -> Op:
        return replace(
            op, reads=op.reads[:1], reads_at=op.reads_at[:1], writes=op.writes[:1], writes_at=op.writes_at[:1]
        )

    def elsewhere(op: Op) -> Op:
        return replace(op, reads_at=op.reads_at[:1] * 2, writes_at=op.writes_at[:1] * 2)

    for change, says in (
        (hidden_alone, "residual would keep all of them"),
        (elsewhere, "select_rows before post_attn_norm reads residual"),
    ):
        report = verify(engine_config, prompts(23, 5), layouts=("sequence-parallel",), tamper=spoil(change))
        assert says in report.layouts[0].failure


# -- a plan without one of its reductions ----------------------------------------------------------------------------


def test_every_removed_reduction_is_named_by_plan_and_numbers(engine_config: EngineConfig) -> None:
    """One after the other, every reduction of a layout: refused by name before it runs, and seen by name if it does."""
    plans: list[Plan] = []

    def keep(plan: Plan) -> Plan:
        plans.append(plan)
        return plan

    verify(engine_config, prompts(6, 3), num_decode=1, layouts=["sequence-parallel"], tamper=keep)
    ops = [(segment.layers[0] if segment.layers else None, op) for segment in plans[0].segments for op in segment.ops]
    reductions = [(number, layer, op) for number, (layer, op) in enumerate(ops) if completes(op)]
    assert len(reductions) == 5  # into both norms of the dense layer and of the MoE layers, and the last
    for number, layer, op in reductions:
        tamper = without(lambda at, _layer, _step, number=number: at == number)  # type: ignore[misc]
        where = op.boundary if layer is None else f"layer {layer} {op.boundary}"
        report = verify(engine_config, prompts(6, 3), num_decode=1, layouts=["sequence-parallel"], tamper=tamper)
        (layout,) = report.layouts
        assert not report.ok and layout.failure.startswith("the plan is not valid: "), layout.failure
        assert where in layout.failure and "sum is still owed" in layout.failure


@pytest.mark.parametrize(
    ("layout", "layer", "boundary"),
    [
        pytest.param("all-reduce", 0, "input_norm", marks=pytest.mark.full),
        ("all-reduce", 0, "post_attn_norm"),
        pytest.param("norm-before-gather", 1, "post_attn_norm", marks=pytest.mark.full),
        ("norm-before-gather", 1, "input_norm"),
        ("all-reduce", None, "final_norm"),
    ],
)
def test_a_removed_reduction_that_still_runs_is_the_first_difference(
    engine_config: EngineConfig, layout: str, layer: int | None, boundary: str
) -> None:
    """All-reduces only: without a reduce-scatter the rows would not fit what comes next."""

    def is_one(_number: int, at: int | None, op: Op) -> bool:
        return completes(op) and op.name == "all_reduce" and (at, op.boundary) == (layer, boundary)

    report = verify(
        engine_config, prompts(6, 3), num_decode=1, layouts=[layout], tamper=without(is_one), validate=False
    )
    (result,) = report.layouts
    first = result.first_difference
    assert first is not None and result.failure == str(first)
    assert (first.spot.layer, first.spot.stage, first.step) == (layer, boundary, 0)
    assert first.relative > 1e-2 and result.worst >= first.relative
    assert f"{boundary}: hidden differs by" in result.failure


# -- weights that are wrong on one rank ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "rank"),
    [
        ("input_layernorm", 1),
        pytest.param("input_layernorm", 2, marks=pytest.mark.full),
        ("input_layernorm", 3),
        pytest.param("post_attention_layernorm", 1, marks=pytest.mark.full),
        ("post_attention_layernorm", 2),
        pytest.param("post_attention_layernorm", 3, marks=pytest.mark.full),
    ],
)
def test_a_wrong_norm_on_one_rank_is_named_with_the_rank(engine_config: EngineConfig, norm: str, rank: int) -> None:
    """Both where the norm's rows are scattered, and where other ranks hold replicas of them."""

    def change(weight: Weight, at: int, _times: int, tensor: Tensor) -> Tensor:
        return tensor * 1.01 if at == rank and weight.name == f"model.layers.1.{norm}.weight" else tensor

    report = verify(engine_config, prompts(9, 7), num_decode=1, source=changed(engine_config, change))
    stage = "input_norm" if norm == "input_layernorm" else "post_attn_norm"
    assert [layout.layout for layout in report.layouts if layout.ok] == []
    for layout in report.layouts:
        first = layout.first_difference
        assert first is not None and first.spot == Spot(1, stage, "hidden"), layout
        assert first.rank == rank and f"on rank {rank}" in layout.failure
        assert 1e-3 < first.relative < 2e-2


def test_a_wrong_shard_is_named_at_its_sum(engine_config: EngineConfig) -> None:
    def change(weight: Weight, at: int, _times: int, tensor: Tensor) -> Tensor:
        return tensor * 1.05 if at == 3 and weight.name == "model.layers.2.self_attn.o_proj.weight" else tensor

    for layout in verify(engine_config, prompts(9, 7), num_decode=1, source=changed(engine_config, change)).layouts:
        assert layout.first_difference is not None
        assert layout.first_difference.spot == Spot(2, "attention", "hidden")


def test_nan_counts_as_a_difference(engine_config: EngineConfig) -> None:
    def change(weight: Weight, at: int, _times: int, tensor: Tensor) -> Tensor:
        return tensor * float("nan") if at == 1 and weight.name == "model.norm.weight" else tensor

    for layout in verify(engine_config, prompts(9, 7), num_decode=1, source=changed(engine_config, change)).layouts:
        assert not layout.ok and layout.first_difference is not None
        assert layout.first_difference.spot.stage == "final_norm"
        assert {layout.worst, layout.max_logit_difference, layout.mean_logit_difference} == {float("inf")}
        assert layout.kl == float("inf")


def test_the_last_gather_of_logits_is_compared_too(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later stage's output would reveal it."""
    true_gather = Communicator.column_gather

    def gather(self: Communicator, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        gathered = true_gather(self, x, *rest, **more)
        return gathered.roll(1, dims=1) if self.rank == 2 else gathered

    monkeypatch.setattr(Communicator, "column_gather", gather)
    for layout in verify(engine_config, prompts(9, 7), num_decode=1).layouts:
        assert layout.first_difference is not None and not layout.ok
        assert layout.first_difference.spot == Spot(None, "gathered", "logits") and layout.first_difference.rank == 2


# -- near-ties in the choice of experts ------------------------------------------------------------------------------


def nudged(amount: float) -> Change:
    """Correction biases a little off, alike on all ranks, but not on the one rank that they are compared with.

    They decide which experts are chosen, not with what weight: with the choice replayed nothing else may differ.
    """

    def change(weight: Weight, at: int, times: int, tensor: Tensor) -> Tensor:
        if not weight.name.endswith("e_score_correction_bias") or (at == 0 and times == 0):
            return tensor
        return tensor + amount * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))

    return change


def flips(layout: LayoutReport) -> set[tuple[int, int, int]]:
    return {(flip.step, flip.layer, flip.row) for flip in layout.flips}


def test_expert_flips_are_reported_with_margin_but_are_no_difference(engine_config: EngineConfig) -> None:
    report = verify(engine_config, prompts(23, 5, 40, 1, 9), source=changed(engine_config, nudged(3e-3)))
    assert report.ok
    for layout in report.layouts:
        assert len(layout.flips) >= 3, "the change is meant to flip a few"
        assert len(layout.flips) == len(flips(layout)), "a row whose router ran on several ranks is one flip"
        if layout.layout == "auto":  # whose last layer may have run on the rows with logits alone
            flipped = flips(report.layouts[0])
            assert flips(layout) <= flipped and all(spot[:2] == (2, 2) for spot in flipped - flips(layout))
        else:
            assert flips(layout) == flips(report.layouts[0])
        assert all(0 <= flip.margin < 0.05 and flip.layer in (1, 2) for flip in layout.flips)
        assert layout.max_logit_difference < 1e-5 and layout.agreement == 1.0


def test_without_a_change_nothing_flips(engine_config: EngineConfig) -> None:
    report = verify(engine_config, prompts(23, 5), source=changed(engine_config, nudged(0.0)))
    assert report.ok and all(layout.flips == [] for layout in report.layouts)


def test_a_router_with_other_weights_is_a_difference(engine_config: EngineConfig) -> None:
    """Only the choice is replayed; the weights are each run's own."""

    def change(weight: Weight, at: int, times: int, tensor: Tensor) -> Tensor:
        if not weight.name.endswith("gate.weight") or (at == 0 and times == 0):
            return tensor
        return tensor * 1.01

    report = verify(engine_config, prompts(23, 5), source=changed(engine_config, change))
    for layout in report.layouts:
        assert layout.first_difference is not None
        assert layout.first_difference.spot == Spot(1, "router", "topk_weights")
